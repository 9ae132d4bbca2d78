//! KVM's own statistics, as KVM_GET_STATS_FD describes them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::sys;

/// The fixed part of a descriptor: flags u32, exponent i16, count of values u16, offset u32, bucket
/// size u32; the name follows.
const DESCRIPTOR: usize = 16;

/// More than any kernel has; what the kernel says is believed up to here.
const MOST_DESCRIPTORS: usize = 4096;
const LONGEST_NAME: usize = 256;

/// Every counter of a VM or vCPU by its name in KVM; a histogram is the sum of its buckets. Empty
/// where the kernel has no statistics (before 5.14).
pub(super) fn read(fd: &impl AsRawFd) -> Vec<(String, u64)> {
    match sys::stats_fd(fd).and_then(|stats| read_all(&File::from(stats))) {
        Ok(stats) => stats,
        Err(error) => {
            log::debug!("KVM tells no statistics: {error}");
            Vec::new()
        }
    }
}

fn read_all(file: &File) -> io::Result<Vec<(String, u64)>> {
    // kvm_stats_header: flags, name size, number of descriptors, then the offsets of the id, of the
    // descriptors and of the data; each a u32.
    let mut header = [0; 24];
    file.read_exact_at(&mut header, 0)?;
    let field = |n: usize| u32_at(&header, n * 4) as usize;
    let (name_size, count) = (field(1).min(LONGEST_NAME), field(2).min(MOST_DESCRIPTORS));
    let (descriptors_at, data_at) = (field(4) as u64, field(5) as u64);
    let mut descriptors = vec![0; count * (DESCRIPTOR + name_size)];
    file.read_exact_at(&mut descriptors, descriptors_at)?;
    let mut stats = Vec::with_capacity(count);
    for descriptor in descriptors.chunks_exact(DESCRIPTOR + name_size) {
        let values = usize::from(u16::from_le_bytes([descriptor[6], descriptor[7]]));
        let offset = u64::from(u32_at(descriptor, 8));
        let name = descriptor[DESCRIPTOR..].split(|&b| b == 0).next().unwrap_or_default();
        let mut data = vec![0; values * 8];
        file.read_exact_at(&mut data, data_at + offset)?;
        let sum = data.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).fold(0, u64::wrapping_add);
        stats.push((String::from_utf8_lossy(name).into_owned(), sum));
    }
    Ok(stats)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
