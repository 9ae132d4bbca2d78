//! What the guest sends on a connection.

use std::collections::VecDeque;
use std::io;

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};

use super::super::env::{Env, Fate, Key, Payload};
use super::super::sys;
use super::segment::{ACK, FIN, RST, SYN, Segment, bare, distance};
use super::{RETRY, State, Tcp, span};

impl Tcp {
    /// The guest sent `segment` with `payload` behind it.
    pub(in super::super) fn segment(
        &mut self,
        env: &mut Env,
        key: &Key,
        segment: &Segment,
        payload: &mut Payload<'_, '_>,
    ) -> Fate {
        match self.state {
            State::Connecting | State::SynReceived if segment.flags & (SYN | ACK) == SYN => {
                if segment.seq.wrapping_add(1) != self.expected {
                    self.abort(env);
                    return Fate::Replace;
                }
                self.syn = self.state == State::SynReceived;
                return Fate::Keep;
            }
            State::TimeWait if segment.flags & (SYN | RST) == SYN => return Fate::Replace,
            State::Connecting | State::TimeWait if segment.has(RST) => {
                self.abort(env);
                return Fate::Remove;
            }
            State::Connecting => return Fate::Keep,
            State::TimeWait => {
                self.acknowledge = true;
                return Fate::Keep;
            }
            State::SynSent => return self.answered(env, key, segment),
            State::SynReceived | State::Established => {}
        }
        if segment.has(RST) {
            // RFC 5961, section 3.2: only what is exactly next counts.
            if segment.seq == self.expected {
                self.abort(env);
                return Fate::Remove;
            }
            self.acknowledge = distance(segment.seq, self.expected) > 0;
            return Fate::Keep;
        }
        if segment.has(SYN) {
            // RFC 5961, section 4.2: a guest that has forgotten the connection resets it.
            self.acknowledge = true;
            return Fate::Keep;
        }
        if !segment.has(ACK) {
            return Fate::Keep;
        }
        if distance(segment.ack, self.most) > 0 {
            if self.state == State::SynReceived {
                env.push(bare(env, key, (segment.ack, 0), RST, 0, &[]));
            } else {
                self.acknowledge = true;
            }
            return Fate::Keep;
        }
        if self.state == State::SynReceived {
            if segment.ack != self.next {
                return Fate::Keep;
            }
            self.establish(env);
        }
        self.last = env.now;
        if self.acknowledged(env, segment, payload.len()).is_err()
            || self.take(env, segment, payload).is_err()
        {
            self.reset(env, key);
            return Fate::Remove;
        }
        self.settled()
    }

    /// The guest's answer to our SYN.
    fn answered(&mut self, env: &mut Env, key: &Key, segment: &Segment) -> Fate {
        if segment.has(ACK) && segment.ack != self.most {
            if !segment.has(RST) {
                env.push(bare(env, key, (segment.ack, 0), RST, 0, &[]));
            }
            return Fate::Keep;
        }
        if segment.has(RST | ACK) {
            self.abort(env);
            return Fate::Remove;
        }
        if segment.has(SYN | ACK) {
            self.learn(env, segment);
            self.establish(env);
            self.acknowledge = true;
        }
        Fate::Keep
    }

    fn establish(&mut self, env: &Env) {
        self.state = State::Established;
        self.unacknowledged = self.most;
        self.next = self.most;
        (self.retry, self.tries, self.backoff) = (None, 0, 0);
        self.readable = true;
        self.syn = false;
        self.last = env.now;
    }

    /// Takes an acknowledgement and the window with it.
    fn acknowledged(&mut self, env: &Env, segment: &Segment, len: usize) -> io::Result<()> {
        let count = distance(segment.ack, self.unacknowledged);
        let window = u32::from(segment.window) << self.scale;
        if count > 0 {
            let ended = self.end.is_some_and(|end| distance(segment.ack, end) > 0);
            // Positive, and within what was sent.
            let data = count.unsigned_abs() - u32::from(ended);
            if data > 0
                && let Some(socket) = &self.socket
            {
                sys::discard(socket, data as usize)?;
            }
            self.unacknowledged = segment.ack;
            if distance(self.next, segment.ack) < 0 {
                self.next = segment.ack;
            }
            (self.duplicates, self.tries, self.backoff) = (0, 0, 0);
            self.retry = (self.in_flight() > 0).then(|| env.now + RETRY);
        } else if count == 0 && len == 0 && self.in_flight() > 0 && !segment.has(FIN) && window == self.window
        {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == 3 {
                self.rewind(env);
                self.retry = Some(env.now + self.timeout());
            }
        }
        // RFC 9293, section 3.10.7.4: not by what is older than what said so last.
        let (seq, ack) = self.window_from;
        let newer = distance(segment.seq, seq) > 0 || segment.seq == seq && distance(segment.ack, ack) >= 0;
        if count >= 0 && newer {
            if self.window == 0 && window > 0 {
                (self.retry, self.tries, self.backoff) =
                    ((self.in_flight() > 0).then(|| env.now + RETRY), 0, 0);
            }
            self.window = window;
            self.window_from = (segment.seq, segment.ack);
        }
        Ok(())
    }

    /// Takes the guest's data, as far as it is next.
    fn take(&mut self, env: &mut Env, segment: &Segment, payload: &mut Payload<'_, '_>) -> io::Result<()> {
        let old = distance(self.expected, segment.seq);
        let len = payload.len();
        if len == 0 && !segment.has(FIN) {
            // An old segment without data asks where we are (a keepalive, a probe).
            self.acknowledge |= old != 0;
            return Ok(());
        }
        self.acknowledge = true;
        let Some(old) = usize::try_from(old).ok().filter(|&old| old <= len && !self.guest_ended) else {
            return Ok(());
        };
        payload.advance(old);
        let open = usize::try_from(distance(self.offered, self.expected)).unwrap_or(0);
        let all = payload.len() <= open;
        payload.truncate(open);
        let mut taken = 0;
        if self.held.is_empty()
            && payload.len() > 0
            && let Some(socket) = &self.socket
        {
            taken = match payload.send(socket) {
                Ok(done) => done,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(error),
            };
        }
        // What has no room comes again.
        let rest = payload.len().min(env.config.most_held.saturating_sub(env.held));
        let complete = all && rest == payload.len();
        if rest > 0 {
            let start = self.held.len();
            self.held.resize(start + rest, 0);
            // Contiguous in one or two pieces.
            let (front, back) = self.held.as_mut_slices();
            let split = start.min(front.len());
            let done = payload.read(&mut front[split..]);
            payload.read(&mut back[start - split..][..rest - done]);
            env.held += rest;
        }
        self.expected = self.expected.wrapping_add(span(taken + rest));
        if complete && segment.has(FIN) {
            self.expected = self.expected.wrapping_add(1);
            self.guest_ended = true;
        }
        self.flush(env)
    }

    /// Gives the socket what is held for it, and then the end.
    pub(super) fn flush(&mut self, env: &mut Env) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let held = !self.held.is_empty();
        while !self.held.is_empty() {
            match rustix::net::send(
                socket,
                self.held.as_slices().0,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(done) => {
                    self.held.drain(..done);
                    env.held -= done;
                    self.last = env.now;
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        if held {
            self.held = VecDeque::new();
            // The window opens again.
            self.acknowledge = true;
        }
        if self.guest_ended && !self.shut {
            self.shut = true;
            match rustix::net::shutdown(socket, Shutdown::Write) {
                // It has ended by itself already.
                Ok(()) | Err(Errno::NOTCONN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether both sides have said all and know it of each other.
    pub(super) fn settled(&mut self) -> Fate {
        let told = self.end.is_some_and(|end| distance(self.unacknowledged, end) > 0);
        if self.state != State::Established || !told || !self.shut {
            return Fate::Keep;
        }
        if !self.acknowledge {
            return Fate::Remove;
        }
        // The guest's end is to be acknowledged yet, and that may be lost.
        self.state = State::TimeWait;
        self.socket = None;
        self.retry = None;
        Fate::Keep
    }
}
