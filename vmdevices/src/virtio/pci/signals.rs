//! What virtio-pci tells its driver, and how: by messages or by the pin.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::pci::Interrupts;
use crate::virtio::device::Transport;
use crate::virtio::runner::Status;
use crate::virtio::status;

/// No vector (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status (4.1.4.5).
const USED_BUFFER: u8 = 1;
const CONFIG_CHANGE: u8 = 2;

/// What vCPUs and workers share of the transport.
#[derive(Debug)]
pub(super) struct Signals {
    pub(super) status: Arc<Status>,
    pub(super) generation: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    isr: Mutex<u8>,
    pub(super) interrupts: OnceLock<Interrupts>,
}

impl Signals {
    pub(super) fn new(status: Arc<Status>, queues: usize) -> Self {
        let vector = || AtomicU16::new(NO_VECTOR);
        Self {
            status,
            generation: AtomicU8::new(0),
            config_vector: vector(),
            queue_vectors: (0..queues).map(|_| vector()).collect(),
            isr: Mutex::new(0),
            interrupts: OnceLock::new(),
        }
    }

    /// By the message of `vector`, or by the pin where there are no messages (4.1.5.1.2, 4.1.5.3).
    fn raise(&self, vector: &AtomicU16, reason: u8) {
        let Some(interrupts) = self.interrupts.get() else { return };
        if interrupts.uses_messages() {
            // There is no vector of this number.
            return interrupts.message(vector.load(Ordering::Acquire));
        }
        let mut isr = self.isr();
        *isr |= reason;
        interrupts.level(true);
    }

    /// Reads the ISR status, which clears it and lowers the pin.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.isr();
        if let Some(interrupts) = self.interrupts.get() {
            interrupts.level(false);
        }
        std::mem::take(&mut *isr)
    }

    pub(super) fn isr(&self) -> MutexGuard<'_, u8> {
        self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn vectors(&self) -> impl Iterator<Item = &AtomicU16> {
        self.queue_vectors.iter().chain([&self.config_vector])
    }
}

impl Transport for Signals {
    fn used(&self, queue: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.raise(vector, USED_BUFFER);
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        // A driver that is not ready yet must not be interrupted (virtio 1.2, section 3.1.1).
        if self.status.has(status::DRIVER_OK) {
            self.raise(&self.config_vector, CONFIG_CHANGE);
        }
    }
}
