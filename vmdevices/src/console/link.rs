//! A device's end of a console.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmcore::{Control, EventSet, IoThread, Outcome, Result, Watch};

use super::{Console, Descriptor, Input};

/// How many bytes of output are kept for a host that does not take them. The newest are kept: what
/// a guest says last tells most.
const KEPT: usize = 64 << 10;

/// How much input is read ahead of the guest, in bytes.
const AHEAD: usize = 4096;

/// A device's end of a [`Console`]: never blocks, never fails, and loses nothing in silence.
///
/// Output that the host does not take is kept, up to 64 KiB; beyond that the oldest is dropped,
/// counted ([`Link::lost`]) and reported once to the log. Dropping the link waits for a host that
/// still takes what is kept, and for [`Console::patience`] for one that does not.
///
/// Input is read up to 4 KiB ahead of the guest and then stays with the host until the guest has
/// read some. The device has the link under its own lock: vCPU and I/O threads call it in turn.
pub struct Link {
    console: Box<dyn Console>,
    kept: VecDeque<u8>,
    lost: u64,
    /// The log has been told of the loss.
    told: bool,
    /// The host takes no more output.
    closed: bool,
    /// Input read ahead; `None` is a break.
    ahead: VecDeque<Option<u8>>,
    /// The host may have more input.
    more: bool,
    /// The host gives no more input.
    ended: bool,
    control: Option<Control>,
}

impl Link {
    /// Connects a device to `console`.
    pub fn new(console: impl Console + 'static) -> Self {
        Self {
            console: Box::new(console),
            kept: VecDeque::new(),
            lost: 0,
            told: false,
            closed: false,
            ahead: VecDeque::new(),
            more: true,
            ended: false,
            control: None,
        }
    }

    /// Puts out the bytes that the guest wrote, now where the host takes them.
    pub fn write(&mut self, mut bytes: &[u8]) {
        self.flush();
        if self.kept.is_empty() {
            while !bytes.is_empty() && !self.closed {
                match self.console.write(bytes) {
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Ok(taken) if taken > 0 => bytes = bytes.get(taken..).unwrap_or_default(),
                    answer => {
                        self.fail(answer, bytes.len());
                        return;
                    }
                }
            }
        }
        if self.closed {
            self.lose(bytes.len(), "the host has closed the console");
            return;
        }
        self.kept.extend(bytes);
        if let Some(excess) = self.kept.len().checked_sub(KEPT).filter(|&excess| excess > 0) {
            self.kept.drain(..excess);
            self.lose(excess, "the host takes it too slowly");
        }
    }

    /// Offers kept output again. To be called when [`Console::output`] becomes writable; every
    /// write does so too.
    pub fn flush(&mut self) {
        while !self.kept.is_empty() {
            match self.console.write(self.kept.as_slices().0) {
                Ok(taken) if taken > 0 => drop(self.kept.drain(..taken.min(self.kept.len()))),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                answer => {
                    let count = self.kept.len();
                    self.kept.clear();
                    self.fail(answer, count);
                }
            }
        }
    }

    /// Takes bytes of input into `buffer`, never more than one [`Input::Break`] or one piece of text at a
    /// time. After [`Input::End`] there is none. Never gives [`Input::Quit`].
    pub fn read(&mut self, buffer: &mut [u8]) -> Input {
        if self.ahead.is_empty() {
            self.fill();
        }
        let mut count = 0;
        while let (Some(Some(byte)), Some(to)) = (self.ahead.front(), buffer.get_mut(count)) {
            *to = *byte;
            count += 1;
            self.ahead.pop_front();
        }
        match self.ahead.front() {
            _ if count > 0 => Input::Bytes(count),
            Some(Some(_)) => Input::Nothing,
            Some(None) => {
                self.ahead.pop_front();
                Input::Break
            }
            None if self.ended => Input::End,
            None => Input::Nothing,
        }
    }

    /// Puts bytes of input back to the front of the line: what a device has taken and its guest has not.
    pub fn put_back(&mut self, bytes: &[u8]) {
        for byte in bytes.iter().rev() {
            self.ahead.push_front(Some(*byte));
        }
    }

    /// The bytes that were read from the host and not yet from the link: for a device to save, and to
    /// [`Link::set_unread`] when it is restored.
    pub fn unread(&self) -> Vec<u8> {
        self.ahead.iter().copied().flatten().collect()
    }

    /// Has `bytes` be the input that was read ahead, in place of what was: a device that goes back to
    /// a saved state has its input of then.
    pub fn set_unread(&mut self, bytes: &[u8]) {
        self.ahead.clear();
        self.put_back(bytes);
    }

    /// Takes note that the host can take output or has input. To be called when a [`Link::watch`]
    /// says so, and once when the device is made; the device is to [`Link::read`] after it.
    pub fn ready(&mut self) {
        self.flush();
        self.more = true;
        self.fill();
    }

    /// Takes the input that there is now, up to 64 KiB, and none that comes later: for machines whose
    /// input must not depend on when it comes.
    pub fn end_input(&mut self) {
        self.more = true;
        self.fill_to(KEPT);
        self.ended = true;
    }

    /// Has the user's wish to quit end the machine with [`Outcome::Stopped`].
    pub fn set_control(&mut self, control: Control) {
        self.control = Some(control);
    }

    /// Reads ahead, also when the guest reads nothing: the user must be able to quit.
    fn fill(&mut self) {
        self.fill_to(AHEAD);
    }

    fn fill_to(&mut self, most: usize) {
        let mut buffer = [0; 1024];
        while self.more && !self.ended {
            let room = most.saturating_sub(self.ahead.len()).min(buffer.len());
            if room == 0 {
                return;
            }
            match self.console.read(&mut buffer[..room]) {
                Ok(Input::Bytes(0) | Input::End) => self.ended = true,
                // A console that claims more than there was room for is wrong, but does no harm.
                Ok(Input::Bytes(count)) => {
                    self.ahead.extend(buffer.iter().take(count.min(room)).copied().map(Some));
                }
                Ok(Input::Nothing) => self.more = false,
                Ok(Input::Break) => self.ahead.push_back(None),
                Ok(Input::Quit) => match &self.control {
                    Some(control) => control.end(Outcome::Stopped),
                    None => log::warn!("the user wants to quit, but this console can stop no VM"),
                },
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    self.more = false;
                }
                Err(e) => {
                    log::warn!("console input ends: {e}");
                    self.ended = true;
                }
            }
        }
    }

    /// Whether something has to wait for the host: if so, [`Link::watch`] it from an I/O thread.
    pub fn needs_thread(&self) -> bool {
        self.waits_for().iter().any(|(descriptor, _)| descriptor.is_some())
    }

    /// Has `thread` call `ready` when there is *new* input or room for output. It is to call
    /// [`Link::ready`].
    ///
    /// # Errors
    /// Where the host cannot wait for one of the console's descriptors.
    pub fn watch(&self, thread: &IoThread, ready: impl Fn() + Clone + Send + 'static) -> Result<Vec<Watch>> {
        let watches = self.waits_for().into_iter().filter_map(|(descriptor, events)| {
            let ready = ready.clone();
            // By edges: a host that closed its end stays readable for ever.
            let events = events | EventSet::EDGE_TRIGGERED;
            Some(thread.watch(descriptor?, events, move |_| ready()))
        });
        watches.collect()
    }

    /// What to wait for, each by edges: then [`Link::ready`] is to be called.
    pub(crate) fn waits_for(&self) -> [(Option<Descriptor>, EventSet); 2] {
        let input = if self.ended { None } else { self.console.input() };
        [(input, EventSet::IN), (self.console.output(), EventSet::OUT)]
    }

    /// How many bytes of output are lost.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Columns and rows of the terminal, where it has any.
    pub fn size(&self) -> Option<(u16, u16)> {
        self.console.size()
    }

    fn fail(&mut self, answer: io::Result<usize>, count: usize) {
        let error = answer.err().unwrap_or_else(|| ErrorKind::WriteZero.into());
        self.closed = error.kind() == ErrorKind::BrokenPipe;
        self.lose(count, &error.to_string());
    }

    fn lose(&mut self, count: usize, why: &str) {
        self.lost = self.lost.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        if count > 0 && !self.told {
            self.told = true;
            log::warn!("console output is lost, {count} bytes to begin with: {why}");
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let patience = self.console.patience();
        let mut since = Instant::now();
        loop {
            let before = self.kept.len();
            self.flush();
            if self.kept.len() < before {
                since = Instant::now();
            }
            let Some(left) = patience.checked_sub(since.elapsed()) else { break };
            let Some(descriptor) = self.console.output().filter(|_| !self.kept.is_empty()) else { break };
            let mut wait = [PollFd::new(&*descriptor, PollFlags::OUT)];
            // An error shows in what comes of the flush; a signal that interrupts is none.
            let timeout = Timespec::try_from(left).ok();
            if poll(&mut wait, timeout.as_ref()) == Ok(1) && self.kept.len() == before {
                // It may be ready for less than is offered.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let left = self.kept.len();
        self.lose(left, "the host does not take it, and the device ends");
        if self.lost > 0 {
            log::warn!("console output: {} bytes were lost in all", self.lost);
        }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("kept", &self.kept.len())
            .field("lost", &self.lost)
            .field("closed", &self.closed)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::sync::{Arc, Mutex};

    /// Takes `room` bytes, then says what it is told to say.
    #[derive(Default)]
    struct Host {
        room: usize,
        taken: Vec<u8>,
        refusal: Option<ErrorKind>,
        writes: usize,
    }

    struct Slow(Arc<Mutex<Host>>);

    impl Console for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut host = self.0.lock().unwrap();
            host.writes += 1;
            let taken = bytes.len().min(host.room);
            if taken == 0 {
                return Err(host.refusal.unwrap_or(ErrorKind::WouldBlock).into());
            }
            host.room -= taken;
            host.taken.extend(&bytes[..taken]);
            Ok(taken)
        }
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
            Ok(Input::Bytes(buffer.len() + 1))
        }
    }

    fn slow(room: usize) -> (Link, Arc<Mutex<Host>>) {
        let host = Arc::new(Mutex::new(Host { room, ..Host::default() }));
        (Link::new(Slow(host.clone())), host)
    }

    #[test]
    fn input_is_read_ahead_so_far_and_comes_in_order() {
        let (console, script) = crate::console::memory().unwrap();
        let mut link = Link::new(console);
        let text: Vec<u8> = (0..10_000u32).map(|i| u8::try_from(i % 253).unwrap()).collect();
        script.send(&text).unwrap();
        link.ready();
        assert_eq!(script.unread(), text.len() - AHEAD);
        let (mut got, mut buffer) = (Vec::new(), [0; 16]);
        while let Input::Bytes(count) = link.read(&mut buffer) {
            got.extend(&buffer[..count]);
            if got.len() % 160 == 0 {
                link.put_back(&got.split_off(got.len() - 10));
            }
        }
        assert!(got == text);
        assert_eq!(link.read(&mut buffer), Input::Nothing);
        link.put_back(b"old");
        link.set_unread(b"saved");
        assert_eq!((link.unread(), link.read(&mut buffer)), (b"saved".to_vec(), Input::Bytes(5)));
        script.close_input();
        link.ready();
        assert_eq!(link.read(&mut buffer), Input::End);
        assert!(!link.needs_thread());
    }

    #[test]
    fn quit_and_break_come_through() {
        struct Keys(Vec<Input>);
        impl Console for Keys {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                Ok(bytes.len())
            }
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
                buffer[0] = b'x';
                Ok(self.0.pop().unwrap_or(Input::Nothing))
            }
        }
        let mut link = Link::new(Keys(vec![Input::Quit, Input::Bytes(1), Input::Break, Input::Bytes(1)]));
        let control = Control::detached();
        link.set_control(control.clone());
        link.ready();
        assert_eq!(control.asked(), Some(Outcome::Stopped), "though nobody read");
        let mut buffer = [0; 9];
        assert_eq!(
            [(); 4].map(|()| link.read(&mut buffer)),
            [Input::Bytes(1), Input::Break, Input::Bytes(1), Input::Nothing]
        );
    }

    #[test]
    fn what_the_host_does_not_take_comes_later_and_in_order() {
        let (mut link, host) = slow(3);
        link.write(b"abcdef");
        link.write(b"gh");
        assert_eq!(host.lock().unwrap().taken, b"abc");
        host.lock().unwrap().room = 4;
        link.write(b"i");
        assert_eq!(host.lock().unwrap().taken, b"abcdefg");
        host.lock().unwrap().room = 100;
        link.flush();
        assert_eq!(host.lock().unwrap().taken, b"abcdefghi");
        assert_eq!(link.lost(), 0);
    }

    #[test]
    fn the_oldest_is_lost_and_counted_when_the_host_stays_slow() {
        let (mut link, host) = slow(0);
        let text: Vec<u8> = (0..KEPT + 1000).map(|i| u8::try_from(i % 251).unwrap()).collect();
        for piece in text.chunks(7) {
            link.write(piece);
        }
        assert_eq!(link.lost(), 1000);
        host.lock().unwrap().room = usize::MAX;
        drop(link);
        assert_eq!(host.lock().unwrap().taken, text[1000..]);
    }

    #[test]
    fn the_end_waits_for_a_host_that_is_slow() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut link =
            Link::new(crate::console::Stdio::on(File::open("/dev/null").unwrap(), &writer).unwrap());
        drop(writer);
        let text: Vec<u8> = (0..120_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        link.write(&text);
        let reader = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(1));
            let mut got = Vec::new();
            reader.read_to_end(&mut got).map(|_| got)
        });
        drop(link);
        assert!(reader.join().unwrap().unwrap() == text);
    }

    #[test]
    fn a_closed_host_is_not_written_to_again() {
        let (mut link, host) = slow(2);
        host.lock().unwrap().refusal = Some(ErrorKind::BrokenPipe);
        link.write(b"abcd");
        link.write(b"ef");
        assert_eq!((link.lost(), host.lock().unwrap().writes), (4, 2));
    }

    #[test]
    fn an_error_loses_bytes_and_not_the_console() {
        let (mut link, host) = slow(0);
        host.lock().unwrap().refusal = Some(ErrorKind::StorageFull);
        link.write(b"abcd");
        host.lock().unwrap().room = 10;
        link.write(b"ef");
        assert_eq!(link.lost(), 4);
        assert_eq!(host.lock().unwrap().taken, b"ef");
    }

    #[test]
    fn a_console_that_claims_too_much_input_does_no_harm() {
        let (mut link, _) = slow(0);
        link.ready();
        assert_eq!(link.unread().len(), AHEAD);
        assert_eq!(link.read(&mut []), Input::Nothing);
        assert_eq!(link.read(&mut [0; 4]), Input::Bytes(4));
    }
}
