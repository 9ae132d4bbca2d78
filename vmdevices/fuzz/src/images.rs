//! A disk image made of fuzzing input, in each format that is not raw.
//!
//! The input is a list of pieces: an offset in the file of 4 bytes, a length of 2, and as many bytes. What
//! is between them is a hole, so that images of megabytes stay small inputs; [`seed`] makes one of a real
//! image, and `tests/any_image.rs` a corpus of them, with `VMCORE_FUZZ_CORPUS` set to where it goes.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemory as _, Permissions};
use vmcore::memory::MemoryMap;
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};
use vmdevices::block::{Format, Image};
use vmdevices::buffers::Buffers;

/// Most bytes of an image file.
const MOST: u64 = 16 << 20;
const PIECE: usize = 512;
const STEP: usize = 1 << 16;

/// Opens the image in `input`, reads all of it (or the better part), and writes where that is possible.
/// Whether it could be opened.
pub fn image(format: Format, input: &[u8]) -> bool {
    let file = file(input);
    if format == Format::Vhdx {
        checksums(&file);
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let image = Image::new(path, format);
    let writable = format == Format::Qcow2;
    let Ok(disk) = if writable { image } else { image.read_only() }.open() else { return false };

    let memory = GuestMemory::new();
    let region = MemoryRegion::anonymous(GuestAddress(0), STEP as u64).expect("memory");
    memory.insert(region.into()).expect("no overlap");
    let map = memory.snapshot();
    let len = disk.len();
    assert!(len > 0 && len % 512 == 0);
    let places = (0..32).map(|n| n * STEP as u64).chain([
        len / 3 / 512 * 512,
        len - 512,
        len.saturating_sub(STEP as u64),
    ]);
    for at in places.filter(|&at| at < len) {
        let here = usize::try_from(len - at).unwrap_or(STEP).min(STEP);
        let _ = disk.read_at(&mut buffers(&map, here), at);
        if writable {
            let _ = disk.write_at(&mut buffers(&map, here.min(1024)), at);
            let _ = disk.write_zeroes(at, here as u64, at % 3 == 0);
        }
    }
    let _ = disk.discard(0, len.min(1 << 20));
    let _ = disk.flush();
    true
}

fn buffers(map: &MemoryMap, len: usize) -> Buffers<'_> {
    let mut buffers = Buffers::default();
    let slices = map.get_slices(GuestAddress(0), len, Permissions::Write).expect("memory");
    slices.for_each(|slice| buffers.push(slice.expect("memory")));
    buffers
}

/// The file that `input` describes, in memory.
fn file(mut input: &[u8]) -> File {
    let file = tempfile().expect("a file in memory");
    while let Some((&[a, b, c, d, e, f], rest)) = input.split_first_chunk() {
        let (at, len) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]));
        let (piece, rest) = rest.split_at(rest.len().min(len.into()));
        file.write_all_at(piece, u64::from(at) % MOST).expect("room");
        input = rest;
    }
    file
}

fn tempfile() -> std::io::Result<File> {
    let path = std::env::temp_dir().join(format!(
        "vmcore-fuzz-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(&path)?;
    std::fs::remove_file(path)?;
    file.flush()?;
    Ok(file)
}

/// Makes the checksums of a VHDX right: nobody would guess them.
fn checksums(file: &File) {
    for (at, len) in [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536)] {
        let mut bytes = vec![0; len];
        if file.read_exact_at(&mut bytes, at).is_ok() {
            bytes[4..8].fill(0);
            let step = |crc: u32, &byte: &u8| {
                (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                    crc >> 1 ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1))
                })
            };
            let sum = !bytes.iter().fold(u32::MAX, step);
            file.write_all_at(&sum.to_le_bytes(), at + 4).expect("room");
        }
    }
}

/// The input that describes `image`.
#[cfg_attr(fuzzing, expect(dead_code, reason = "for tests/any_image.rs"))]
pub fn seed(image: &[u8]) -> Vec<u8> {
    let mut input = Vec::new();
    let mut piece = |at: usize, bytes: &[u8]| {
        input.extend_from_slice(&(at as u32).to_le_bytes());
        input.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        input.extend_from_slice(bytes);
    };
    for (n, bytes) in image.chunks(PIECE).enumerate() {
        if bytes.iter().any(|&byte| byte != 0) {
            piece(n * PIECE, bytes);
        }
    }
    // As long as it was.
    piece(image.len().saturating_sub(1), &image[image.len().saturating_sub(1)..]);
    input
}
