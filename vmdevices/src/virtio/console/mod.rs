//! virtio-console: one port, `hvc0` to Linux (virtio 1.2, section 5.3).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmcore::{GuestMemory, Machine, Result};

use super::device::{Activation, DeviceType, Progress, Source, VirtioDevice, Worker, read_config_bytes};
use super::queue::{QueueError, VirtQueue};
use crate::console::{Console, Input, Link};
use crate::saved;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// `VIRTIO_CONSOLE_F_SIZE` and `VIRTIO_CONSOLE_F_EMERG_WRITE` (section 5.3.3).
const F_SIZE: u64 = 1 << 0;
const F_EMERG_WRITE: u64 = 1 << 2;

/// Offset of `emerg_wr` in the configuration (section 5.3.4).
const EMERGENCY: u64 = 8;

/// Buffers served before others on the same thread have a turn.
const TURN: usize = 64;

/// Most bytes of one buffer of output. Drivers send a few KiB; all that a buffer may have, 4 GiB,
/// would occupy the thread.
const MOST_OUTPUT: usize = 1 << 20;

const WHAT: &str = "a virtio console";
const STATE_VERSION: u8 = 1;

/// A console, connected to a [`crate::console`] of the host.
///
/// Output goes to the host as the guest writes it; input comes as fast as the guest takes it, and
/// none is lost. The guest is told the size that the host's terminal has when the device is made.
///
/// On a deterministic machine the guest's input is what the console has when the VM is built, up to
/// 64 KiB; what comes later is not read.
#[derive(Debug)]
pub struct VirtioConsole {
    /// The worker's while the device is active; kept here over resets.
    link: Arc<Mutex<Link>>,
    size: Option<(u16, u16)>,
}

impl VirtioConsole {
    /// A console on `console`.
    pub fn new(console: impl Console + 'static) -> Self {
        let link = Link::new(console);
        let size = link.size();
        Self { link: Arc::new(Mutex::new(link)), size }
    }
}

fn lock(link: &Mutex<Link>) -> MutexGuard<'_, Link> {
    link.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }

    fn features(&self) -> u64 {
        F_EMERG_WRITE | self.size.map_or(0, |_| F_SIZE)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.size.unwrap_or_default();
        let [a, b] = columns.to_le_bytes();
        let [c, d] = rows.to_le_bytes();
        // One port; emerg_wr reads as anything.
        read_config_bytes(&[a, b, c, d, 1, 0, 0, 0, 0, 0, 0, 0], offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // A character without queues, for a kernel that is dying; never blocks, as no Link does.
        if offset == EMERGENCY
            && let Some(&character) = data.first()
        {
            lock(&self.link).write(&[character]);
        }
    }

    fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        let mut link = lock(&self.link);
        link.set_control(machine.control());
        if machine.is_deterministic() {
            link.end_input();
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let Activation { memory, queues, .. } = activation;
        let link = self.link.clone();
        // What came before the driver did.
        lock(&link).ready();
        Ok(vec![Box::new(ConsoleWorker { memory, queues, link })])
    }

    fn save(&self) -> Result<Vec<u8>> {
        saved::save(WHAT, STATE_VERSION, &lock(&self.link).unread())
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let unread: Vec<u8> = saved::restore(WHAT, STATE_VERSION, state)?;
        lock(&self.link).set_unread(&unread);
        Ok(())
    }
}

struct ConsoleWorker {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    link: Arc<Mutex<Link>>,
}

impl ConsoleWorker {
    /// Puts out what the guest wrote.
    fn transmit(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(TRANSMIT)) else { return Ok(Progress::Idle) };
        let link = &self.link;
        queue.serve(&map, TURN, TURN, |chain| {
            if chain.readable.len() > MOST_OUTPUT {
                return Err(QueueError::Request { queue: TRANSMIT, what: "more than 1 MiB of text at once" });
            }
            let mut text = [0; 4096];
            while let count @ 1.. = chain.readable.read(&mut text) {
                lock(link).write(&text[..count]);
            }
            Ok(0)
        })
    }

    /// Gives input to the guest while both have room. Input without a buffer stays in the link, and
    /// a buffer without input in its queue.
    fn receive(&mut self) -> Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(queue) = self.queues.get_mut(usize::from(RECEIVE)) else { return Ok(Progress::Idle) };
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
                return Err(QueueError::Request { queue: RECEIVE, what: "a receive buffer without room" });
            }
            let count = loop {
                match lock(&self.link).read(&mut text[..room]) {
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
}

impl Worker for ConsoleWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, queue: u16) -> Result<Progress, QueueError> {
        match queue {
            RECEIVE => self.receive(),
            _ => self.transmit(),
        }
    }

    fn sources(&self) -> Vec<Source> {
        let waits = lock(&self.link).waits_for();
        waits.into_iter().filter_map(|(fd, events)| Some(Source { fd: fd?, events })).collect()
    }

    fn ready(&mut self, _: usize) -> Result<Progress, QueueError> {
        lock(&self.link).ready();
        self.receive()
    }
}
