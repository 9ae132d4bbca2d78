//! virtio-console: terminals and named ports of a guest (virtio 1.2, section 5.3).

mod control;
mod ports;
mod worker;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmcore::{Error, Machine, Result};

use super::device::{Activation, DeviceType, VirtioDevice, Worker, read_config_bytes};
use crate::console::{Console, Link};
use crate::saved;
use control::Message;
pub use ports::ConsoleHandle;
use ports::{Port, Shared, Standing};
use worker::ConsoleWorker;

/// `VIRTIO_CONSOLE_F_SIZE`, `_MULTIPORT` and `_EMERG_WRITE` (section 5.3.3).
const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u32 = 1;
const F_EMERG_WRITE: u64 = 1 << 2;

/// Offset of `emerg_wr` in the configuration (section 5.3.4).
const EMERGENCY: u64 = 8;

/// Most ports of one device: it has two queues for each.
const MOST_PORTS: usize = 31;

/// Longest name of a port in bytes.
const MOST_NAME: usize = 64;

const WHAT: &str = "a virtio console";
const STATE_VERSION: u8 = 2;

/// A console (`hvc0` to Linux), connected to a [`crate::console`] of the host, and further ports beside it.
///
/// Output goes to the host as the guest writes it; input comes as fast as the guest takes it, and
/// none is lost. The guest is told the size that the host's terminal has when the device is made, and
/// later what [`ConsoleHandle::set_size`] says.
///
/// With [`VirtioConsole::port`] and [`VirtioConsole::console`] the guest has more ports
/// (`VIRTIO_CONSOLE_F_MULTIPORT`): named ones for programs, which Linux has as `/dev/vport*` (with udev
/// `/dev/virtio-ports/NAME`), and further terminals. Input of a port waits until a program has it open. A
/// driver that knows single consoles only has the first one.
///
/// On a deterministic machine the guest's input is what the consoles have when the VM is built, up to
/// 64 KiB each; what comes later is not read.
#[derive(Debug)]
pub struct VirtioConsole {
    shared: Arc<Shared>,
    /// A state was restored: the driver that is next knows of its ports.
    restored: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// Input that was not taken, and how the port stands.
    ports: Vec<(Vec<u8>, Standing)>,
    messages: Vec<Message>,
}

impl VirtioConsole {
    /// A console on `console`.
    pub fn new(console: impl Console + 'static) -> Self {
        let shared = Arc::new(Shared::new(Port::new(None, Link::new(console))));
        Self { shared, restored: false }
    }

    /// Adds a port called `name` for programs of the guest, connected to `console`.
    ///
    /// # Errors
    /// [`Error::Config`] where the name is empty, longer than 64 bytes, has a control character or belongs
    /// to another port; where there are 31 ports; and where a handle was taken before.
    pub fn port(self, name: impl Into<String>, console: impl Console + 'static) -> Result<Self> {
        let name = name.into();
        let fits = (1..=MOST_NAME).contains(&name.len()) && !name.chars().any(char::is_control);
        if !fits || self.shared.ports.iter().any(|port| port.name.as_ref() == Some(&name)) {
            return Err(Error::Config {
                what: "name of a console port",
                value: format!("{name:?}"),
                fix: format!("use 1 to {MOST_NAME} bytes without control characters, once"),
            });
        }
        self.add(Port::new(Some(name), Link::new(console)))
    }

    /// Adds a terminal: `hvc1` and up to Linux.
    ///
    /// # Errors
    /// [`Error::Config`] where there are 31 ports, or a handle was taken before.
    pub fn console(self, console: impl Console + 'static) -> Result<Self> {
        self.add(Port::new(None, Link::new(console)))
    }

    fn add(mut self, port: Port) -> Result<Self> {
        let refused =
            |value: String, fix: &str| Error::Config { what: "console port", value, fix: fix.into() };
        let count = self.shared.ports.len();
        if count >= MOST_PORTS {
            return Err(refused(format!("number {count}"), "use another console device for more than 31"));
        }
        match Arc::get_mut(&mut self.shared) {
            Some(shared) => shared.add(port),
            None => {
                return Err(refused("added behind a handle".into(), "take the handle after the last port"));
            }
        }
        Ok(self)
    }

    /// What changes and watches the ports while the guest runs. Take it after the last port was added; the
    /// guest is told then that terminals may change their size.
    ///
    /// # Errors
    /// [`Error::Os`] where the host is out of descriptors.
    pub fn handle(&self) -> Result<ConsoleHandle> {
        self.shared.handle().map_err(|error| Error::os("eventfd", "console", error))
    }

    fn is_multiport(&self) -> bool {
        self.shared.ports.len() > 1
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }

    fn features(&self) -> u64 {
        let sized = self.shared.wake().is_some() || self.shared.size(0).is_some();
        let size = if sized { F_SIZE } else { 0 };
        F_EMERG_WRITE | size | u64::from(self.is_multiport()) << F_MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // Two for each port, and with several ports two for messages about them.
        let messages = if self.is_multiport() { 2 } else { 0 };
        vec![64; 2 * self.shared.ports.len() + messages]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.shared.size(0).unwrap_or_default();
        let [a, b] = columns.to_le_bytes();
        let [c, d] = rows.to_le_bytes();
        let [ports, ..] = self.shared.ports.len().to_le_bytes();
        // emerg_wr reads as anything.
        read_config_bytes(&[a, b, c, d, ports, 0, 0, 0, 0, 0, 0, 0], offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // A character without queues, for a kernel that is dying; never blocks, as no Link does.
        if offset == EMERGENCY
            && let (Some(&character), Some(port)) = (data.first(), self.shared.ports.first())
        {
            port.link().write(&[character]);
        }
    }

    fn attached(&mut self, machine: &mut Machine) -> Result<()> {
        for port in &self.shared.ports {
            let mut link = port.link();
            link.set_control(machine.control());
            if machine.is_deterministic() {
                link.end_input();
            }
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let multiport = activation.has(F_MULTIPORT);
        let Activation { memory, queues, transport, .. } = activation;
        {
            let mut state = self.shared.state();
            state.multiport = multiport;
            state.transport = Some(transport);
            if !std::mem::take(&mut self.restored) {
                // Another driver, which knows nothing yet.
                state.messages.clear();
                for standing in &mut state.standing {
                    (standing.ready, standing.guest_open) = (false, false);
                }
            }
        }
        // What came before the driver did.
        self.shared.ports.iter().for_each(|port| port.link().ready());
        let (shared, sources) = (self.shared.clone(), ConsoleWorker::sources(&self.shared, multiport));
        Ok(vec![Box::new(ConsoleWorker { memory, queues, shared, multiport, sources })])
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = self.shared.state();
        let unread = self.shared.ports.iter().map(|port| port.link().unread());
        let ports = unread.zip(state.standing.iter().copied()).collect();
        saved::save(WHAT, STATE_VERSION, &State { ports, messages: state.messages.iter().copied().collect() })
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<()> {
        let State { ports, messages } = saved::restore(WHAT, STATE_VERSION, bytes)?;
        let (count, found) = (self.shared.ports.len(), ports.len());
        if found != count {
            return Err(Error::State {
                what: WHAT,
                expected: format!("{count} ports"),
                found: format!("{found} ports"),
            });
        }
        let mut state = self.shared.state();
        for ((port, now), (unread, standing)) in self.shared.ports.iter().zip(&mut state.standing).zip(ports)
        {
            port.link().set_unread(&unread);
            *now = standing;
        }
        state.messages = messages.into();
        drop(state);
        self.restored = true;
        Ok(())
    }
}
