//! One function of a bus: configuration space, device, and where its BARs answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use vmcore::{BusDevice, Error, GuestAddress, Platform, Result};

use super::config::{self, Config, command};
use super::device::{Bar, Description, MsixTable, PciDevice, Programmed};
use super::interrupt::{self, Interrupts};
use super::windows::{self, Windows};
use crate::complaints::Complaints;

/// A function, as the bus and the views of its BARs share it.
pub(super) type SharedFunction = Arc<Mutex<Function>>;

pub(super) fn lock(function: &Mutex<Function>) -> MutexGuard<'_, Function> {
    // A device that panicked (an embedder's own) is used on as it is.
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct Function {
    name: String,
    config: Config,
    device: Box<dyn PciDevice>,
    bars: Vec<Mapped>,
    msix: Option<MsixTable>,
    interrupts: Interrupts,
    platform: Platform,
    complaints: Complaints,
    /// Itself, for the views of its BARs, which keep it.
    own: Weak<Mutex<Function>>,
}

/// A BAR, and where it answers at present.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    bar: Bar,
    at: Option<u64>,
}

/// All of it that a snapshot needs.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    config: Vec<u8>,
    interrupts: interrupt::State,
    device: Vec<u8>,
}

impl Function {
    /// A function whose BARs are programmed to be where `windows` has room, and answer there.
    ///
    /// # Errors
    /// [`Error::Config`] for what no function can be, and where there is no room.
    pub(super) fn new(
        name: String,
        device: Box<dyn PciDevice>,
        description: &Description,
        mut config: Config,
        interrupts: Interrupts,
        platform: Platform,
        windows: &mut Windows,
    ) -> Result<SharedFunction> {
        for bar in &description.bars {
            config.set_bar(bar, windows.allocate(bar)?.0);
        }
        config.set_command(command::MEMORY);
        let function = Arc::new_cyclic(|own| {
            Mutex::new(Self {
                name,
                config,
                device,
                bars: description.bars.iter().map(|&bar| Mapped { bar, at: None }).collect(),
                msix: description.msix,
                interrupts,
                platform,
                complaints: Complaints::default(),
                own: own.clone(),
            })
        });
        let mut guard = lock(&function);
        let interrupts = guard.interrupts.clone();
        guard.device.connect(interrupts);
        guard.obey_command();
        guard.map();
        drop(guard);
        Ok(function)
    }

    /// Reads configuration space; `more` says whether the slot has further functions.
    pub(super) fn read_config(&mut self, offset: usize, data: &mut [u8], more: bool) {
        self.config.read(offset, data);
        config::overlay(offset, data, self.interrupts.wanted(), more);
        for (index, range) in self.config.capabilities().iter().enumerate() {
            let (from, to) = (range.start.max(offset), range.end.min(offset.saturating_add(data.len())));
            if from < to {
                let part = &mut data[from - offset..to - offset];
                self.device.read_capability(index, from - range.start, part);
            }
        }
    }

    /// Writes configuration space. Whether a BAR gave up a place, that another may be waiting for.
    pub(super) fn write_config(&mut self, offset: usize, data: &[u8]) -> bool {
        let changes = self.config.write(offset, data);
        if let Some(control) = self.config.msix_control().filter(|_| changes.msix) {
            self.interrupts.with_msix(|msix| msix.control(control));
        }
        if changes.command {
            self.obey_command();
        }
        for (index, range) in self.config.capabilities().iter().enumerate() {
            let (from, to) = (range.start.max(offset), range.end.min(offset.saturating_add(data.len())));
            if from < to {
                self.device.write_capability(index, from - range.start, &data[from - offset..to - offset]);
            }
        }
        (changes.command || changes.bars) && self.map()
    }

    /// What the command register says of interrupts and of access to memory.
    fn obey_command(&mut self) {
        let command = self.config.command();
        let master = command & command::MASTER != 0;
        self.interrupts.command(command & command::INTX_DISABLE != 0, master);
        self.device.programmed(Programmed::Master(master));
    }

    /// Has every BAR answer where it is programmed to, as far as the bridge forwards that and nobody else is
    /// there. Whether one gave up a place.
    pub(super) fn map(&mut self) -> bool {
        let decoding = self.config.command() & command::MEMORY != 0;
        let wanted = |config: &Config, bar: &Bar| {
            let at = config.bar(bar);
            (decoding && windows::forwards(at, bar.len)).then_some(at)
        };
        let wanted: Vec<_> = self.bars.iter().map(|mapped| wanted(&self.config, &mapped.bar)).collect();
        let mut freed = false;
        // All of them go before one comes: they may change places.
        for (mapped, wanted) in self.bars.iter_mut().zip(&wanted) {
            if let Some(at) = mapped.at.filter(|_| mapped.at != *wanted) {
                self.platform.displace(GuestAddress(at));
                mapped.at = None;
                freed = true;
                self.device.programmed(Programmed::Bar { index: mapped.bar.index, at: None });
            }
        }
        for (mapped, wanted) in self.bars.iter_mut().zip(&wanted) {
            let (Some(at), None, Some(function)) = (*wanted, mapped.at, self.own.upgrade()) else { continue };
            let view = View { function, bar: mapped.bar.index };
            match self.platform.place(GuestAddress(at), mapped.bar.len, Arc::new(Mutex::new(view))) {
                Ok(()) => {
                    mapped.at = Some(at);
                    let at = Some(GuestAddress(at));
                    self.device.programmed(Programmed::Bar { index: mapped.bar.index, at });
                }
                Err(error) => {
                    self.complaints.warn(&self.name, format_args!("BAR {}: {error}", mapped.bar.index));
                }
            }
        }
        freed
    }

    /// Takes every BAR away, before functions are put back to where they were.
    pub(super) fn unmap(&mut self) {
        for mapped in &mut self.bars {
            if let Some(at) = mapped.at.take() {
                self.platform.displace(GuestAddress(at));
                self.device.programmed(Programmed::Bar { index: mapped.bar.index, at: None });
            }
        }
    }

    fn read_bar(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match self.msix_part(bar, offset) {
            Some(Part::Table(offset)) => {
                self.interrupts.with_msix(|msix| msix.read_table(offset, data));
            }
            Some(Part::Pending(offset)) => {
                self.interrupts.with_msix(|msix| msix.read_pending(offset, data));
            }
            None => self.device.read(bar, offset, data),
        }
    }

    fn write_bar(&mut self, bar: u8, offset: u64, data: &[u8]) {
        match self.msix_part(bar, offset) {
            Some(Part::Table(offset)) => {
                self.interrupts.with_msix(|msix| msix.write_table(offset, data));
            }
            // Pending bits are not the guest's to write.
            Some(Part::Pending(_)) => {}
            None => self.device.write(bar, offset, data),
        }
    }

    fn msix_part(&self, bar: u8, offset: u64) -> Option<Part> {
        let msix = self.msix.as_ref().filter(|msix| msix.bar == bar)?;
        let within = |start: u32, len: u64| offset.checked_sub(start.into()).filter(|&at| at < len);
        let table = within(msix.table, msix.table_len()).map(Part::Table);
        table.or_else(|| within(msix.pending, msix.pending_len()).map(Part::Pending))
    }

    pub(super) fn retry(&mut self) {
        self.device.retry();
    }

    pub(super) fn save(&self) -> Result<State> {
        let (config, interrupts) = (self.config.bytes().to_vec(), self.interrupts.save());
        Ok(State { config, interrupts, device: self.device.save()? })
    }

    /// Takes over a state, with BARs that answer nowhere (see [`Function::unmap`]) before, and where the state
    /// says afterwards.
    pub(super) fn restore(&mut self, state: State) -> Result<()> {
        let config = <&[u8; config::LEN]>::try_from(&state.config[..]).map_err(|_| Error::State {
            what: "a PCI function",
            expected: format!("{} bytes of configuration space", config::LEN),
            found: format!("{}", state.config.len()),
        })?;
        self.config.restore(config)?;
        self.interrupts.restore(state.interrupts)?;
        self.obey_command();
        self.map();
        self.device.restore(&state.device)
    }
}

impl std::fmt::Debug for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Function").field("name", &self.name).field("bars", &self.bars).finish_non_exhaustive()
    }
}

/// The part of MSI-X that an access to a BAR means, with the offset into it.
enum Part {
    Table(u64),
    Pending(u64),
}

/// A BAR on the bus of guest-physical addresses. Its state is the function's, which the bridge saves.
struct View {
    function: SharedFunction,
    bar: u8,
}

impl BusDevice for View {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.function).read_bar(self.bar, offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.function).write_bar(self.bar, offset, data);
    }
}
