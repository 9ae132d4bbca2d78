//! One stream: credit, shutdown and data on both sides (virtio 1.2, sections 5.10.6.3 to 5.10.6.5).

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;

use rustix::event::epoll::EventFlags;

use super::packet::{Header, op, shut};
use crate::buffers::Buffers;

/// Bytes that the guest may send ahead of what the host's side has taken.
pub(super) const ROOM: u32 = 128 << 10;

/// The guest is told of new room when this much has come since it was last told.
const TELL: u32 = ROOM / 4;

/// Most bytes that one read takes from the host's side, in however many packets.
const MOST_PAYLOAD: usize = 64 << 10;

/// Who asked for a stream, and so waits for the guest's answer.
#[derive(Debug)]
pub(super) enum Opener {
    Guest,
    /// A client of the Unix socket, which is told the port it has on the host's side.
    Front(u32),
    /// The embedder; `false` means that the guest refused.
    Handle(SyncSender<bool>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has not answered yet.
    Requested,
    Open,
    /// The guest is gone, and what it said last is still to be taken by the host.
    Leaving,
}

/// What becomes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum After {
    Keep,
    /// It ends, and the guest is to be told.
    Reset,
    /// It ends, as the guest knows.
    Gone,
}

/// A packet to the guest, whose payload is written already, or several that differ in nothing but `len`,
/// which is then that of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) len: u32,
}

/// What the next packet to the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Packet(Packet),
    Nothing,
    /// The host's side broke.
    Reset,
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    opener: Opener,
    phase: Phase,
    /// Bytes of the guest that the host's side has not taken yet: never more than [`ROOM`].
    kept: VecDeque<u8>,
    /// Bytes that the host's side took, and as many as the guest was told of.
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes sent to the guest, its room, and what it took out of that.
    sent: Wrapping<u32>,
    guest_room: u32,
    guest_took: Wrapping<u32>,
    /// It has been asked for room since it last had some.
    asked: bool,
    owes_open: bool,
    owes_credit: bool,
    /// The host's side may have something to read; it was closed in both directions.
    readable: bool,
    hung_up: bool,
    /// What the guest does no more, what the host does no more, and what the guest knows of that.
    guest_shut: u32,
    host_shut: u32,
    told_shut: u32,
    /// It waits in line to send.
    pub(super) queued: bool,
}

impl Connection {
    /// A stream that the guest is asked for, or that it asked for and is to be granted. `stream` does
    /// not block.
    pub(super) fn new(stream: UnixStream, opener: Opener) -> Self {
        let phase = if matches!(opener, Opener::Guest) { Phase::Open } else { Phase::Requested };
        Self {
            stream,
            opener,
            phase,
            kept: VecDeque::new(),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            sent: Wrapping(0),
            guest_room: 0,
            guest_took: Wrapping(0),
            asked: false,
            owes_open: true,
            owes_credit: false,
            readable: true,
            hung_up: false,
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            queued: false,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether the guest knows nothing of it any more.
    pub(super) fn is_leaving(&self) -> bool {
        self.phase == Phase::Leaving
    }

    /// `buf_alloc` and `fwd_cnt` of a packet that is being sent now.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.owes_credit = false;
        (ROOM, self.forwarded.0)
    }

    /// What the guest says about its room, in each of its packets.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_took = Wrapping(header.fwd_cnt);
        // A guest that answers that it has none is not asked again: it will say when it has.
        self.asked &= self.credit() == 0;
    }

    /// Bytes that the guest has room for. A guest that claims nonsense gets nothing.
    fn credit(&self) -> usize {
        let under_way = (self.sent - self.guest_took).0;
        usize::try_from(self.guest_room.saturating_sub(under_way)).unwrap_or(0)
    }

    /// Takes a packet of the guest, whose payload of the header's length is `body`.
    pub(super) fn receive(&mut self, header: &Header, body: &mut Buffers<'_>) -> After {
        self.learn_credit(header);
        match header.op {
            op::RESPONSE if self.phase == Phase::Requested => self.granted(),
            op::RST => self.left(),
            _ if self.phase != Phase::Open => After::Reset,
            op::RW if self.guest_shut & shut::SEND == 0 => self.take(body),
            op::SHUTDOWN => {
                self.guest_shut |= header.flags & shut::BOTH;
                if self.guest_shut & shut::RECEIVE != 0 {
                    self.shutdown(Shutdown::Read);
                }
                self.flush()
            }
            op::CREDIT_UPDATE => After::Keep,
            op::CREDIT_REQUEST => {
                self.owes_credit = true;
                After::Keep
            }
            _ => After::Reset,
        }
    }

    fn granted(&mut self) -> After {
        self.phase = Phase::Open;
        match &self.opener {
            Opener::Guest => After::Reset,
            // A new socket has room for a line.
            Opener::Front(port) => match (&self.stream).write_all(format!("OK {port}\n").as_bytes()) {
                Ok(()) => After::Keep,
                Err(_) => After::Reset,
            },
            Opener::Handle(answer) => match answer.try_send(true) {
                Ok(()) => After::Keep,
                // Nobody waits any more.
                Err(_) => After::Reset,
            },
        }
    }

    /// The guest reset the stream. What it had sent before it shut down in order still reaches the host.
    fn left(&mut self) -> After {
        if let (Phase::Requested, Opener::Handle(answer)) = (self.phase, &self.opener) {
            answer.try_send(false).ok();
        }
        if self.guest_shut & shut::SEND == 0 || self.kept.is_empty() {
            return After::Gone;
        }
        self.phase = Phase::Leaving;
        self.guest_shut = shut::BOTH;
        After::Keep
    }

    /// Gives the guest's data to the host's side, and keeps what that does not take now.
    fn take(&mut self, body: &mut Buffers<'_>) -> After {
        // The driver must respect the room it was told (section 5.10.6.3.1).
        let room = (ROOM as usize).saturating_sub(self.kept.len());
        if body.len() > room {
            return After::Reset;
        }
        while self.kept.is_empty() && !body.is_empty() && self.host_shut & shut::RECEIVE == 0 {
            match body.drain_to(&self.stream) {
                Ok(taken) => self.forwarded += count(taken),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.host_shut |= shut::RECEIVE,
            }
        }
        if self.host_shut & shut::RECEIVE != 0 {
            self.forwarded += count(body.len());
            return After::Keep;
        }
        let mut piece = [0; 4096];
        while let length @ 1.. = body.read(&mut piece) {
            self.kept.extend(&piece[..length]);
        }
        After::Keep
    }

    /// Offers what is kept to the host's side again.
    fn flush(&mut self) -> After {
        while !self.kept.is_empty() {
            match (&self.stream).write(self.kept.as_slices().0) {
                Ok(taken) => {
                    self.kept.drain(..taken);
                    self.forwarded += count(taken);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return After::Keep,
                Err(_) => {
                    self.host_shut |= shut::RECEIVE;
                    self.forwarded += count(self.kept.len());
                    self.kept.clear();
                }
            }
        }
        // A stream that was slow once does not hold its memory for ever.
        self.kept = VecDeque::new();
        if self.guest_shut & shut::SEND != 0 {
            self.shutdown(Shutdown::Write);
        }
        match (self.phase, self.guest_shut) {
            (Phase::Leaving, _) => After::Gone,
            // A clean end (section 5.10.6.5): all was taken, and the guest may use the ports again.
            (_, shut::BOTH) => After::Reset,
            _ => After::Keep,
        }
    }

    /// The host's side is ready for something.
    pub(super) fn ready(&mut self, events: EventFlags) -> After {
        self.readable |= events.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP);
        if events.contains(EventFlags::HUP) {
            self.hung_up = true;
            match self.phase {
                // Who asked does not wait for the answer.
                Phase::Requested => return After::Reset,
                Phase::Leaving => return After::Gone,
                Phase::Open if self.guest_shut & shut::RECEIVE != 0 => self.host_shut = shut::BOTH,
                // What it had written is still to be read.
                Phase::Open => self.host_shut |= shut::RECEIVE,
            }
        }
        if self.kept.is_empty() { After::Keep } else { self.flush() }
    }

    /// Whether [`Connection::next`] may have something to say.
    pub(super) fn wants(&self) -> bool {
        let news = self.host_shut != self.told_shut || self.owes_credit || self.must_tell();
        self.owes_open || self.phase == Phase::Open && (news || self.may_read())
    }

    fn must_tell(&self) -> bool {
        (self.forwarded - self.told).0 >= TELL
    }

    fn may_read(&self) -> bool {
        let open = self.host_shut & shut::SEND == 0 && self.guest_shut & shut::RECEIVE == 0;
        // Without credit there is nothing to do but ask once.
        self.readable && open && (self.credit() > 0 || !self.asked)
    }

    /// The next packet to the guest; its payload goes to the front of `room`.
    pub(super) fn next(&mut self, room: &Buffers<'_>) -> Next {
        let packet = |op, flags, len| Next::Packet(Packet { op, flags, len });
        if std::mem::take(&mut self.owes_open) {
            let granted = self.phase == Phase::Open;
            return packet(if granted { op::RESPONSE } else { op::REQUEST }, 0, 0);
        }
        if self.phase != Phase::Open {
            return Next::Nothing;
        }
        // Without room for data there is at most something to say.
        if self.may_read() && !room.is_empty() {
            let most = self.credit().min(MOST_PAYLOAD);
            if most == 0 {
                self.asked = true;
                return packet(op::CREDIT_REQUEST, 0, 0);
            }
            match room.first(most).fill_from(&self.stream, &mut []) {
                Ok(0) => {
                    self.readable = false;
                    self.host_shut |= if self.hung_up { shut::BOTH } else { shut::SEND };
                }
                Ok(length) => {
                    self.sent += count(length);
                    return packet(op::RW, 0, count(length).0);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(_) => return Next::Reset,
            }
        }
        if self.host_shut != self.told_shut {
            self.told_shut = self.host_shut;
            return packet(op::SHUTDOWN, self.host_shut, 0);
        }
        if self.owes_credit || self.must_tell() {
            return packet(op::CREDIT_UPDATE, 0, 0);
        }
        Next::Nothing
    }

    fn shutdown(&self, how: Shutdown) {
        // One that is closed already is as good.
        self.stream.shutdown(how).ok();
    }
}

/// Counters of bytes are modulo 2^32 (section 5.10.6.3).
fn count(bytes: usize) -> Wrapping<u32> {
    Wrapping(u32::try_from(bytes as u64 & u64::from(u32::MAX)).unwrap_or(0))
}
