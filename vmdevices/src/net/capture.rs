//! Records of what goes through a card, in the classic format of pcap (draft-ietf-opsawg-pcap).

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{HEADER, MOST_PACKET, NetBackend, forward};
use crate::buffers::Buffers;

/// Of files with nanoseconds, in the byte order of the writer, which is little-endian here.
const MAGIC: u32 = 0xa1b2_3c4d;
const VERSION: [u16; 2] = [2, 4];
/// `LINKTYPE_ETHERNET`.
const ETHERNET: u32 = 1;

/// A file in which the packets of one or several back ends are recorded, for tcpdump and Wireshark.
///
/// Each packet is written at once, on the thread that moves it. A packet that the guest leaves to the
/// host to cut into segments or to put a checksum on is recorded as the guest made it. The first
/// write that fails ends the capture, and nothing else. Clones write to the same file.
///
/// ```no_run
/// # fn main() -> vmcore::Result<()> {
/// use vmdevices::{Net, net::{Capture, Tap}};
///
/// let capture = Capture::create("guest.pcap", Capture::WHOLE)
///     .map_err(|e| vmcore::Error::os("create", "guest.pcap", e))?;
/// let card = Net::new(capture.record(Tap::open("tap0")?))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Capture(Arc<Mutex<Sink>>);

struct Sink {
    /// `None` after an error.
    out: Option<Box<dyn Write + Send>>,
    snap: usize,
    /// One record, so that it is written in one piece.
    record: Vec<u8>,
    error: Option<Arc<io::Error>>,
}

impl Capture {
    /// As many bytes of a packet as there are.
    pub const WHOLE: usize = MOST_PACKET - HEADER;

    /// Records into a new file at `path`, or in place of what it has, the first `snap` bytes of each
    /// packet.
    ///
    /// # Errors
    /// Where the file cannot be made or written.
    pub fn create(path: impl AsRef<Path>, snap: usize) -> io::Result<Self> {
        Self::to(File::create(path)?, snap)
    }

    /// Records into `out`, which must not block.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn to(mut out: impl Write + Send + 'static, snap: usize) -> io::Result<Self> {
        let snap = snap.clamp(1, Self::WHOLE);
        let [major, minor] = VERSION.map(u16::to_le_bytes);
        let length = u32::try_from(snap).unwrap_or(u32::MAX);
        // Between version and length are two words that are always zero.
        let head = [&MAGIC.to_le_bytes()[..], &major, &minor, &[0; 8], &length.to_le_bytes()];
        out.write_all(&[&head.concat()[..], &ETHERNET.to_le_bytes()].concat())?;
        let sink = Sink { out: Some(Box::new(out)), snap, record: Vec::new(), error: None };
        Ok(Self(Arc::new(Mutex::new(sink))))
    }

    /// `backend`, whose packets are recorded: those that were sent and those that came.
    pub fn record<B: NetBackend>(&self, backend: B) -> Captured<B> {
        Captured { backend, capture: self.clone() }
    }

    /// Why the capture has ended, if it has.
    pub fn error(&self) -> Option<Arc<io::Error>> {
        self.lock().error.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Sink> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the first `len` bytes, a header and a frame, of `packet` and what follows it in `spill`.
    fn write(&self, mut packet: Buffers<'_>, spill: &[u8], len: usize) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let frame = len.saturating_sub(HEADER);
        let mut sink = self.lock();
        let Sink { out, snap, record, error } = &mut *sink;
        let Some(writer) = out else { return };
        let spill = &spill[HEADER.saturating_sub(packet.len()).min(spill.len())..];
        packet.advance(HEADER);
        let kept = frame.min(*snap).min(packet.len() + spill.len());
        let word = |value: usize| u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes();
        // Seconds wrap in 2106, as the format has it.
        let seconds = u32::try_from(now.as_secs() & 0xffff_ffff).unwrap_or(0).to_le_bytes();
        record.clear();
        for field in [seconds, now.subsec_nanos().to_le_bytes(), word(kept), word(frame)] {
            record.extend(field);
        }
        let start = record.len();
        record.resize(start + kept, 0);
        let fits = start + kept.min(packet.len());
        packet.read(&mut record[start..fits]);
        let rest = start + kept - fits;
        record[fits..].copy_from_slice(&spill[..rest]);
        if let Err(failed) = writer.write_all(record) {
            log::warn!("network capture ends: {failed}");
            (*out, *error) = (None, Some(Arc::new(failed)));
        }
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sink = self.lock();
        f.debug_struct("Capture").field("snap", &sink.snap).field("error", &sink.error).finish()
    }
}

/// A back end whose packets are recorded; see [`Capture::record`].
#[derive(Debug)]
pub struct Captured<B> {
    backend: B,
    capture: Capture,
}

impl<B: NetBackend> NetBackend for Captured<B> {
    forward!(self => self.backend);

    fn source(&self) -> Option<Arc<dyn AsRawFd + Send + Sync>> {
        self.backend.source()
    }
    fn holds_back(&self) -> bool {
        self.backend.holds_back()
    }
    fn send(&mut self, packet: &mut Buffers<'_>) -> io::Result<()> {
        let (copy, len) = (packet.view(), packet.len());
        self.backend.send(packet)?;
        self.capture.write(copy, &[], len);
        Ok(())
    }
    fn receive(&mut self, into: &mut Buffers<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let copy = into.view();
        let len = self.backend.receive(into, spill)?;
        self.capture.write(copy, spill, len);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::pair;
    use crate::net::tests::{frame, receive, send, short};

    /// A file that has room for `0` bytes.
    #[derive(Clone)]
    struct Limited(usize, Arc<Mutex<Vec<u8>>>);

    impl Write for Limited {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut written = self.1.lock().unwrap();
            if written.len() + bytes.len() > self.0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            written.extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn packets_of_both_directions_are_recorded_as_far_as_asked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let capture = Capture::create(file.path(), 20).unwrap();
        let (mut far, near) = pair().unwrap();
        let mut near = capture.record(near);
        send(&mut near, &frame(60, 1)).unwrap();
        send(&mut far, &frame(15, 2)).unwrap();
        assert_eq!(receive(&mut near), Some(frame(15, 2)));
        assert_eq!((receive(&mut near), receive(&mut far)), (None, Some(frame(60, 1))));

        let bytes = std::fs::read(file.path()).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!([word(0), word(4), word(16), word(20)], [0xa1b2_3c4d, 0x0004_0002, 20, 1]);
        assert_eq!((word(32), word(36), &bytes[40..60]), (20, 60, &frame(20, 1)[..]));
        assert_eq!((word(68), word(72), &bytes[76..]), (15, 15, &frame(15, 2)[..]));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(now - u64::from(word(24)) < 100 && word(28) < 1_000_000_000);
    }

    #[test]
    fn packets_that_the_guest_has_no_room_for_are_recorded_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let capture = Capture::create(file.path(), 40).unwrap();
        let (far, near) = pair().unwrap();
        short(far, capture.record(near));
        let mut record = [&40u32.to_le_bytes()[..], &60u32.to_le_bytes()].concat();
        record.extend(frame(40, 7));
        for written in std::fs::read(file.path()).unwrap()[24..].chunks(16 + 40) {
            assert_eq!(written[8..], record);
        }
    }

    #[test]
    fn a_full_disk_ends_the_capture_and_not_the_net() {
        let written = Arc::default();
        let capture = Capture::to(Limited(24 + 2 * (16 + 60), Arc::clone(&written)), Capture::WHOLE).unwrap();
        let (mut far, near) = pair().unwrap();
        let mut near = capture.record(near);
        for n in 0..5 {
            send(&mut near, &frame(60, n)).unwrap();
            assert_eq!(receive(&mut far), Some(frame(60, n)));
            assert_eq!(capture.error().is_some(), n >= 2);
        }
        // Whole records only, also where a shorter one would have had room.
        assert_eq!(written.lock().unwrap().len(), 24 + 2 * (16 + 60));
        assert!(Capture::to(Limited(23, Arc::default()), 100).is_err());
    }
}
