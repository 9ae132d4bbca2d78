//! How a function interrupts: by its pin or by messages.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmcore::{Error, IrqLine, Msi, Platform, Result};

use super::msix::Msix;

/// Functions of a bus.
const FUNCTIONS: usize = 256;

/// The wires that the pins of all functions share: each is high while any of its functions wants it to be.
#[derive(Debug)]
pub(super) struct Wires(Vec<Wire>);

#[derive(Debug)]
struct Wire {
    gsi: u32,
    line: IrqLine,
    asking: Mutex<[u64; FUNCTIONS / 64]>,
}

impl Wires {
    /// The wires into `gsis`; a number that comes twice is one wire.
    pub(super) fn new(platform: &Platform, gsis: &[u32]) -> Self {
        let mut wires: Vec<Wire> = Vec::new();
        for &gsi in gsis {
            if wires.iter().all(|wire| wire.gsi != gsi) {
                wires.push(Wire { gsi, line: platform.irq_line(gsi), asking: Mutex::default() });
            }
        }
        Self(wires)
    }

    /// Function number `function` asks for `gsi`, or does not.
    fn set(&self, gsi: u32, function: u8, high: bool) {
        let Some(wire) = self.0.iter().find(|wire| wire.gsi == gsi) else { return };
        let mut asking = wire.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let (word, bit) = (usize::from(function) / 64, 1 << (function % 64));
        if high {
            asking[word] |= bit
        } else {
            asking[word] &= !bit
        }
        // With the lock held, so that levels arrive in order.
        wire.line.set_level(asking.iter().any(|&word| word != 0));
    }
}

/// The pin of one function.
#[derive(Clone, Debug)]
pub(super) struct Pin {
    pub(super) wires: Arc<Wires>,
    pub(super) gsi: u32,
    /// Number of the function on its bus.
    pub(super) function: u8,
}

/// A device's way to the interrupt controllers. Clones mean the same function; any thread may use them.
#[derive(Clone, Debug)]
pub struct Interrupts(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    platform: Platform,
    pin: Option<Pin>,
    state: Mutex<State>,
}

/// All of it that a snapshot needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// What the device wants of its pin.
    level: bool,
    /// Interrupt Disable of the command register (PCI 6.2.2).
    disabled: bool,
    /// Bus Master of the command register: messages are writes of the function to memory.
    master: bool,
    msix: Option<Msix>,
}

impl Interrupts {
    pub(super) fn new(platform: Platform, pin: Option<Pin>, vectors: Option<u16>) -> Self {
        let state = State { level: false, disabled: false, master: false, msix: vectors.map(Msix::new) };
        Self(Arc::new(Shared { platform, pin, state: Mutex::new(state) }))
    }

    /// Whether the guest has switched MSI-X on: then there is no pin, and without it there are no messages.
    pub fn uses_messages(&self) -> bool {
        self.lock().msix.as_ref().is_some_and(Msix::enabled)
    }

    /// Sends the message of MSI-X vector `vector`, or keeps it pending while the guest masks it. Nothing
    /// happens without MSI-X and for vectors that there are not.
    pub fn message(&self, vector: u16) {
        let mut state = self.lock();
        let master = state.master;
        let message = state.msix.as_mut().and_then(|msix| msix.signal(vector, master));
        // With the lock held: a guest that masks a vector gets nothing of it afterwards.
        message.into_iter().for_each(|msi| self.send(msi));
    }

    /// Sets the level of the pin. It is low while MSI-X is on, or the guest has switched the pin off.
    pub fn level(&self, high: bool) {
        let mut state = self.lock();
        state.level = high;
        self.drive(&state);
    }

    pub(super) fn save(&self) -> State {
        self.lock().clone()
    }

    /// Takes over the state of an equal function, and puts the wire where it says. The command register is to
    /// follow.
    pub(super) fn restore(&self, saved: State) -> Result<()> {
        let mut state = self.lock();
        let vectors = |state: &State| state.msix.as_ref().map_or(0, Msix::vectors);
        let (ours, found) = (vectors(&state), vectors(&saved));
        if ours != found || !saved.msix.as_ref().is_none_or(|msix| msix.is_of(ours)) {
            return Err(Error::State {
                what: "MSI-X of a PCI function",
                expected: format!("{ours} vectors"),
                found: format!("{found}"),
            });
        }
        *state = saved;
        self.drive(&state);
        Ok(())
    }

    /// Interrupt Status of the status register (PCI 6.2.3): whatever became of the wish.
    pub(super) fn wanted(&self) -> bool {
        self.lock().level
    }

    /// The guest wrote the command register.
    pub(super) fn command(&self, disabled: bool, master: bool) {
        let mut state = self.lock();
        (state.disabled, state.master) = (disabled, master);
        self.settle(&mut state);
    }

    /// Uses MSI-X, where there is any; pending messages whose masks are gone are sent afterwards.
    pub(super) fn with_msix<R>(&self, act: impl FnOnce(&mut Msix) -> R) -> Option<R> {
        let mut state = self.lock();
        let result = state.msix.as_mut().map(act);
        self.settle(&mut state);
        result
    }

    fn settle(&self, state: &mut State) {
        let master = state.master;
        if let Some(msix) = &mut state.msix {
            msix.take_deliverable(master, |msi| self.send(msi));
        }
        self.drive(state);
    }

    fn drive(&self, state: &State) {
        if let Some(Pin { wires, gsi, function }) = &self.0.pin {
            let messages = state.msix.as_ref().is_some_and(Msix::enabled);
            wires.set(*gsi, *function, state.level && !state.disabled && !messages);
        }
    }

    fn send(&self, msi: Msi) {
        if let Err(error) = self.0.platform.send_msi(msi) {
            log::error!("message {:#x} to {:#x} lost: {error}", msi.data, msi.address);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
