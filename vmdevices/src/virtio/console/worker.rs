//! The queues of the console (virtio 1.2, section 5.3.2).

use std::sync::Arc;

use vmcore::{EventSet, GuestMemory};

use super::control::{LENGTH, Message, event};
use super::ports::Shared;
use crate::console::Input;
use crate::virtio::device::{Progress, Source, Worker};
use crate::virtio::queue::{QueueError, VirtQueue};

/// Numbers of the queues: those of port 0, for messages to and from the driver, and behind these two for
/// each further port.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// Buffers served before others on the same thread have a turn.
const TURN: usize = 64;

/// Most bytes of one buffer of output. Drivers send a few KiB; all that a buffer may have, 4 GiB,
/// would occupy the thread.
const MOST_OUTPUT: usize = 1 << 20;

pub(super) struct ConsoleWorker {
    pub(super) memory: GuestMemory,
    pub(super) queues: Vec<VirtQueue>,
    pub(super) shared: Arc<Shared>,
    pub(super) multiport: bool,
    /// The port of each host descriptor.
    pub(super) sources: Vec<(Source, Option<usize>)>,
}

/// The queue in which port number `port` receives; it transmits in the next one.
fn receive_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 + 2 * port }
}

impl ConsoleWorker {
    /// What the worker waits for: descriptors of all ports that are in use, and the handles' bell.
    pub(super) fn sources(shared: &Shared, multiport: bool) -> Vec<(Source, Option<usize>)> {
        let used = if multiport { shared.ports.len() } else { 1 };
        let bell = shared.wake().map(|wake| Source { fd: wake.clone(), events: EventSet::IN });
        let mut sources: Vec<_> = bell.into_iter().map(|bell| (bell, None)).collect();
        for (number, port) in shared.ports.iter().take(used).enumerate() {
            let waits = port.link().waits_for();
            let waits = waits.into_iter().filter_map(|(fd, events)| Some(Source { fd: fd?, events }));
            sources.extend(waits.map(|source| (source, Some(number))));
        }
        sources
    }

    /// Puts out what the guest wrote.
    fn transmit(&mut self, port: usize) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(receive_queue(port) + 1) else { return Ok(Progress::Idle) };
        let Some(port) = self.shared.ports.get(port) else { return Ok(Progress::Idle) };
        let number = queue.index();
        queue.serve(&map, TURN, TURN, |chain| {
            if chain.readable.len() > MOST_OUTPUT {
                return Err(QueueError::Request { queue: number, what: "more than 1 MiB of text at once" });
            }
            let mut text = [0; 4096];
            while let count @ 1.. = chain.readable.read(&mut text) {
                port.link().write(&text[..count]);
            }
            Ok(0)
        })
    }

    /// Gives input to the guest while both have room. Input without a buffer stays in the link, and
    /// a buffer without input in its queue. Programs that have not opened a port get nothing yet.
    fn receive(&mut self, port: usize) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        if self.multiport && !self.shared.state().standing.get(port).is_some_and(|port| port.guest_open) {
            return Ok(Progress::Idle);
        }
        let Some(queue) = self.queues.get_mut(receive_queue(port)) else { return Ok(Progress::Idle) };
        let Some(port) = self.shared.ports.get(port) else { return Ok(Progress::Idle) };
        let number = queue.index();
        let mut text = [0; 1024];
        queue.disable_notifications(&map)?;
        for _ in 0..TURN {
            let Some(mut chain) = queue.pop(&map)? else {
                queue.signal(&map)?;
                if !queue.enable_notifications(&map)? {
                    return Ok(Progress::Idle);
                }
                queue.disable_notifications(&map)?;
                continue;
            };
            let room = chain.writable.len().min(text.len());
            if room == 0 {
                return Err(QueueError::Request { queue: number, what: "a receive buffer without room" });
            }
            let count = loop {
                match port.link().read(&mut text[..room]) {
                    Input::Bytes(count) => break count,
                    // A port that is no serial line has no break.
                    Input::Break => {}
                    Input::Nothing | Input::End | Input::Quit => break 0,
                }
            };
            if count == 0 {
                queue.unpop(1);
                queue.signal(&map)?;
                // The guest need not say that it has more buffers: there is nothing to put in.
                return Ok(Progress::Idle);
            }
            chain.writable.write(&text[..count]);
            queue.push(&map, chain.head, u32::try_from(count).unwrap_or(0))?;
        }
        queue.signal(&map)?;
        Ok(Progress::More)
    }

    /// Hears the driver's messages, while there is room for the answers.
    fn hear(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        for _ in 0..TURN {
            let Some(queue) = self.queues.get_mut(usize::from(CONTROL_TRANSMIT)) else { break };
            if self.shared.state().is_full() {
                // It goes on when the driver has taken some.
                queue.signal(&map)?;
                return self.tell();
            }
            let Some(mut chain) = queue.pop(&map)? else {
                queue.signal(&map)?;
                if queue.enable_notifications(&map)? {
                    queue.disable_notifications(&map)?;
                    continue;
                }
                return self.tell();
            };
            let mut bytes = [0; LENGTH];
            if chain.readable.read(&mut bytes) < LENGTH {
                let what = "a message that is shorter than 8 bytes";
                return Err(QueueError::Request { queue: CONTROL_TRANSMIT, what });
            }
            queue.push(&map, chain.head, 0)?;
            let message = Message::parse(bytes);
            self.shared.state().take(message, &self.shared.ports);
            if message.event == event::PORT_OPEN
                && let Ok(port) = usize::try_from(message.port)
                && port < self.shared.ports.len()
            {
                // What came before anybody listened.
                let _ = self.receive(port)?;
            }
        }
        let _ = self.tell()?;
        Ok(Progress::More)
    }

    /// Tells the driver what there is to tell, while it has buffers.
    fn tell(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(CONTROL_RECEIVE)) else {
            return Ok(Progress::Idle);
        };
        let shared = &self.shared;
        let held = shared.state().is_full();
        for _ in 0..TURN {
            if shared.state().messages.is_empty() {
                break;
            }
            let Some(mut chain) = queue.pop(&map)? else {
                queue.signal(&map)?;
                if queue.enable_notifications(&map)? {
                    continue;
                }
                break;
            };
            let mut state = shared.state();
            let Some(message) = state.messages.pop_front() else {
                queue.unpop(1);
                break;
            };
            let number = usize::try_from(message.port).unwrap_or(usize::MAX);
            let mut bytes = message.bytes().to_vec();
            match message.event {
                event::PORT_NAME => {
                    let name = shared.ports.get(number).and_then(|port| port.name.as_ref());
                    bytes.extend(name.iter().flat_map(|name| name.bytes()));
                }
                event::RESIZE => {
                    let size = state.standing.get(number).and_then(|standing| standing.size);
                    let (columns, rows) = size.unwrap_or_default();
                    // Columns first, as the specification has it. Linux took the rows first for many
                    // years; Debian's kernels of today do not.
                    bytes.extend([columns.to_le_bytes(), rows.to_le_bytes()].concat());
                }
                _ => {}
            }
            if chain.writable.len() < bytes.len() {
                let what = "a buffer without room for a message";
                return Err(QueueError::Request { queue: CONTROL_RECEIVE, what });
            }
            chain.writable.write(&bytes);
            queue.push(&map, chain.head, u32::try_from(bytes.len()).unwrap_or(0))?;
        }
        queue.signal(&map)?;
        let state = shared.state();
        let again = held && !state.is_full();
        Ok(if again { Progress::More } else { Progress::Idle })
    }
}

impl Worker for ConsoleWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, queue: u16) -> Result<Progress, QueueError> {
        let pair = usize::from(queue / 2);
        match queue {
            0 => self.receive(0),
            1 => self.transmit(0),
            _ if !self.multiport => Ok(Progress::Idle),
            CONTROL_RECEIVE => match self.tell()? {
                // The driver is heard again.
                Progress::More => self.hear(),
                Progress::Idle => Ok(Progress::Idle),
            },
            CONTROL_TRANSMIT => self.hear(),
            _ if queue.is_multiple_of(2) => self.receive(pair - 1),
            _ => self.transmit(pair - 1),
        }
    }

    fn sources(&self) -> Vec<Source> {
        self.sources.iter().map(|(source, _)| source.clone()).collect()
    }

    fn ready(&mut self, source: usize) -> Result<Progress, QueueError> {
        match self.sources.get(source) {
            Some((_, Some(port))) => {
                let port = *port;
                if let Some(port) = self.shared.ports.get(port) {
                    port.link().ready();
                }
                self.receive(port)
            }
            Some((_, None)) => {
                if let Some(wake) = self.shared.wake() {
                    wake.read().ok();
                }
                if self.multiport { self.tell() } else { Ok(Progress::Idle) }
            }
            None => Ok(Progress::Idle),
        }
    }
}

impl Drop for ConsoleWorker {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.transport = None;
        state.multiport = false;
    }
}
