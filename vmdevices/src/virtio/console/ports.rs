//! What device, worker and handles share of the ports.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::control::{Message, event};
use crate::console::Link;
use crate::virtio::device::Transport;

/// Most messages that wait for the driver before it is heard no more.
const MOST_MESSAGES: usize = 128;

/// One port, and what it is connected to.
#[derive(Debug)]
pub(super) struct Port {
    /// Its name in the guest; consoles have none.
    pub(super) name: Option<String>,
    link: Mutex<Link>,
}

impl Port {
    pub(super) fn new(name: Option<String>, link: Link) -> Self {
        Self { name, link: Mutex::new(link) }
    }

    pub(super) fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What changes of a port.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Standing {
    /// The driver knows it.
    pub(super) ready: bool,
    /// A program in the guest has it open.
    pub(super) guest_open: bool,
    /// The host's side is there.
    pub(super) host_open: bool,
    /// Columns and rows.
    pub(super) size: Option<(u16, u16)>,
}

/// What changes of all of them.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) standing: Vec<Standing>,
    /// For the driver.
    pub(super) messages: VecDeque<Message>,
    /// The driver takes messages.
    pub(super) multiport: bool,
    pub(super) transport: Option<Arc<dyn Transport>>,
}

impl State {
    /// A message of the driver.
    pub(super) fn take(&mut self, message: Message, ports: &[Port]) {
        let number = usize::try_from(message.port).unwrap_or(usize::MAX);
        match message.event {
            event::DEVICE_READY if message.value == 1 => {
                for number in 0..ports.len() {
                    self.messages.push_back(Message::new(number, event::PORT_ADD, 1));
                }
            }
            event::PORT_READY if message.value == 1 => {
                let (Some(port), Some(standing)) = (ports.get(number), self.standing.get_mut(number)) else {
                    return;
                };
                standing.ready = true;
                let mut tell = |event, value| self.messages.push_back(Message::new(number, event, value));
                match port.name {
                    None => tell(event::CONSOLE_PORT, 1),
                    Some(_) => tell(event::PORT_NAME, 1),
                }
                if port.name.is_none() && standing.size.is_some() {
                    tell(event::RESIZE, 0);
                }
                tell(event::PORT_OPEN, standing.host_open.into());
            }
            event::PORT_OPEN => {
                if let Some(standing) = self.standing.get_mut(number) {
                    standing.guest_open = message.value == 1;
                }
            }
            _ => {}
        }
    }

    /// Whether the driver is to take messages before it is heard again.
    pub(super) fn is_full(&self) -> bool {
        self.messages.len() >= MOST_MESSAGES
    }

    /// Tells the driver, unless it will hear the same anyway.
    fn tell(&mut self, message: Message) {
        let number = usize::try_from(message.port).unwrap_or(usize::MAX);
        let same = |other: &Message| other.port == message.port && other.event == message.event;
        let ready = self.multiport && self.standing.get(number).is_some_and(|standing| standing.ready);
        if ready {
            // Only the last of several counts.
            self.messages.retain(|other| !same(other));
            self.messages.push_back(message);
        }
    }
}

/// What device, worker and handles share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) ports: Vec<Port>,
    state: Mutex<State>,
    /// Rings when there is something to tell the driver; there where a handle is.
    wake: OnceLock<Arc<EventFd>>,
}

impl Shared {
    /// A console with one port.
    pub(super) fn new(port: Port) -> Self {
        let mut shared = Self { ports: Vec::new(), state: Mutex::default(), wake: OnceLock::new() };
        shared.add(port);
        shared
    }

    /// Adds a port.
    pub(super) fn add(&mut self, port: Port) {
        let size = port.link().size().filter(|_| port.name.is_none());
        self.state().standing.push(Standing { host_open: true, size, ..Standing::default() });
        self.ports.push(port);
    }

    /// What rings when a handle has changed something.
    pub(super) fn wake(&self) -> Option<&Arc<EventFd>> {
        self.wake.get()
    }

    pub(super) fn handle(self: &Arc<Self>) -> io::Result<ConsoleHandle> {
        if self.wake.get().is_none() {
            // Another one may have been quicker.
            self.wake.set(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)).ok();
        }
        Ok(ConsoleHandle(self.clone()))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Columns and rows of port `number`.
    pub(super) fn size(&self, number: usize) -> Option<(u16, u16)> {
        self.state().standing.get(number)?.size
    }
}

/// Changes and watches the ports of a console while the guest runs. Clones are the same console; any
/// thread.
///
/// Ports have the numbers in which they were added: 0 is the one that the console was made with.
#[derive(Clone, Debug)]
pub struct ConsoleHandle(Arc<Shared>);

impl ConsoleHandle {
    fn change(&self, port: usize, act: impl FnOnce(&mut State, usize)) -> io::Result<()> {
        let count = self.0.ports.len();
        if port >= count {
            let what = format!("console port {port}: there are {count}, the last is {}", count - 1);
            return Err(io::Error::new(ErrorKind::NotFound, what));
        }
        act(&mut self.0.state(), port);
        if let Some(wake) = self.0.wake() {
            // It fails where it rings already.
            wake.write(1).ok();
        }
        Ok(())
    }

    /// Tells the guest that the terminal of console `port` has this size now.
    ///
    /// # Errors
    /// `NotFound` where there is no such port, `InvalidInput` where that is no console.
    pub fn set_size(&self, port: usize, columns: u16, rows: u16) -> io::Result<()> {
        if self.0.ports.get(port).is_some_and(|port| port.name.is_some()) {
            let what = format!("size {columns}x{rows} of port {port}: only consoles have a size");
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        }
        let mut transport = None;
        self.change(port, |state, port| {
            if let Some(standing) = state.standing.get_mut(port) {
                standing.size = Some((columns, rows));
            }
            state.tell(Message::new(port, event::RESIZE, 0));
            transport = state.transport.clone().filter(|_| port == 0);
        })?;
        // It is in the configuration too, where drivers of a single port look.
        if let Some(transport) = transport {
            transport.config_changed();
        }
        Ok(())
    }

    /// Opens or closes the host's side of `port`: programs of the guest that read from a closed one find
    /// its end, and those that write an error. It is open to begin with. Consoles are always open.
    ///
    /// # Errors
    /// `NotFound` where there is no such port.
    pub fn set_open(&self, port: usize, open: bool) -> io::Result<()> {
        self.change(port, |state, port| {
            if let Some(standing) = state.standing.get_mut(port) {
                standing.host_open = open;
            }
            state.tell(Message::new(port, event::PORT_OPEN, open.into()));
        })
    }

    /// Whether a program in the guest has `port` open.
    pub fn is_open(&self, port: usize) -> bool {
        self.0.state().standing.get(port).is_some_and(|standing| standing.guest_open)
    }
}
