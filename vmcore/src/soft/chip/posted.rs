//! What a local APIC is to others: where it is, and a box for what they send it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::bus::Destination;

/// A set of vectors, as IRR, ISR and TMR are (SDM vol. 3A, 11.8.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::soft) struct Vectors([u64; 4]);

impl Vectors {
    fn place(vector: u8) -> (usize, u64) {
        (usize::from(vector >> 6), 1 << (vector & 63))
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        let (word, bit) = Self::place(vector);
        self.0[word] & bit != 0
    }

    pub(super) fn set(&mut self, vector: u8, on: bool) {
        let (word, bit) = Self::place(vector);
        self.0[word] = if on { self.0[word] | bit } else { self.0[word] & !bit };
    }

    /// The highest vector, which has the highest priority.
    pub(super) fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&word| word != 0)?;
        u8::try_from(word * 64 + 63 - self.0[word].leading_zeros() as usize).ok()
    }

    /// Register `n`, 0 to 7, of the eight that show the set.
    pub(super) fn register(&self, n: usize) -> u32 {
        let word = self.0[n / 2];
        #[expect(clippy::cast_possible_truncation, reason = "half of the word is wanted")]
        let half = (word >> (32 * (n % 2))) as u32;
        half
    }

    /// The set that eight registers show.
    pub(super) fn from_registers(registers: impl Fn(usize) -> u32) -> Self {
        Self(std::array::from_fn(|n| u64::from(registers(2 * n)) | u64::from(registers(2 * n + 1)) << 32))
    }

    /// Adds the vectors of `new`; in `levels` each of them gets what it has in `new_levels`.
    pub(super) fn merge(&mut self, levels: &mut Self, new: &Self, new_levels: &Self) {
        for n in 0..4 {
            self.0[n] |= new.0[n];
            levels.0[n] = levels.0[n] & !new.0[n] | new_levels.0[n] & new.0[n];
        }
    }

    /// Takes away the vectors below 16, which no interrupt may have; whether there were any.
    pub(super) fn remove_illegal(&mut self) -> bool {
        let illegal = self.0[0] & 0xffff != 0;
        self.0[0] &= !0xffff;
        illegal
    }
}

/// What a message asks for (SDM vol. 3A, 11.6.1, "Delivery Mode").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::soft) enum Mode {
    /// Fixed, or the lowest-priority mode once its receiver has been chosen.
    Fixed,
    Nmi,
    Init,
    /// Start-up; the vector is the page to start at.
    Sipi,
}

/// What [`Posted`] holds besides interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::soft) struct Signals {
    pub(in crate::soft) nmi: bool,
    pub(in crate::soft) init: bool,
    /// Vector of a SIPI.
    pub(in crate::soft) sipi: Option<u8>,
}

/// Where a local APIC is, as far as senders need to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) id: u32,
    /// The 8-bit logical id of xAPIC mode.
    pub(super) logical: u8,
    /// The model of DFR: 0xF flat, 0 cluster.
    pub(super) model: u8,
    /// Not disabled by IA32_APIC_BASE.
    pub(super) enabled: bool,
    pub(super) x2apic: bool,
    /// Enabled by the spurious-interrupt vector register.
    pub(super) software_enabled: bool,
}

impl Address {
    fn pack(self) -> u64 {
        u64::from(self.id)
            | u64::from(self.logical) << 32
            | u64::from(self.model) << 40
            | u64::from(self.enabled) << 48
            | u64::from(self.x2apic) << 49
            | u64::from(self.software_enabled) << 50
    }

    #[expect(clippy::cast_possible_truncation, reason = "the fields are cut out")]
    fn unpack(bits: u64) -> Self {
        Self {
            id: bits as u32,
            logical: (bits >> 32) as u8,
            model: (bits >> 40) as u8,
            enabled: bits & 1 << 48 != 0,
            x2apic: bits & 1 << 49 != 0,
            software_enabled: bits & 1 << 50 != 0,
        }
    }

    /// Whether a message for `destination` is for this APIC (SDM vol. 3A, 11.6.2).
    pub(super) fn matches(&self, destination: Destination) -> bool {
        if !self.enabled {
            return false;
        }
        match destination {
            Destination::All => true,
            Destination::Physical(id) => self.id == id,
            // Cluster in the upper half, a bit for each member in the lower (11.12.10.2).
            Destination::Logical(wanted) if self.x2apic => {
                let own = x2apic_logical(self.id);
                own >> 16 == wanted >> 16 && own & wanted & 0xffff != 0
            }
            Destination::Logical(wanted) => match u8::try_from(wanted) {
                Err(_) => false,
                Ok(wanted) if self.model == 0xf => self.logical & wanted != 0,
                // Cluster 15 is every cluster (11.6.2.2).
                Ok(wanted) => {
                    let cluster = wanted >> 4;
                    (cluster == 0xf || cluster == self.logical >> 4) && self.logical & wanted & 0xf != 0
                }
            },
        }
    }
}

/// The logical id of x2APIC mode, which follows from the id (SDM vol. 3A, 11.12.10.2).
pub(super) fn x2apic_logical(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

const NMI: u32 = 1;
const INIT: u32 = 1 << 1;
const SIPI: u32 = 1 << 2;
const SIPI_VECTOR: u32 = 8;

/// What others have sent to a local APIC and it has not yet taken over; with what of its registers
/// others must know to address it. Methods may be called from any thread.
#[derive(Debug)]
pub(in crate::soft) struct Posted {
    vectors: [AtomicU64; 4],
    /// Which of `vectors` are level-triggered.
    levels: [AtomicU64; 4],
    /// NMI, INIT, SIPI and its vector, together: INIT makes an earlier SIPI void.
    signals: AtomicU32,
    /// [`Address`], packed so that nobody sees half of a change.
    address: AtomicU64,
    /// Task priority, for the lowest-priority mode.
    priority: AtomicU32,
}

impl Posted {
    /// Of the vCPU with APIC id `id`, as after power-up.
    pub(in crate::soft) fn new(id: u32) -> Self {
        let address =
            Address { id, logical: 0, model: 0xf, enabled: true, x2apic: false, software_enabled: false };
        Self {
            vectors: Default::default(),
            levels: Default::default(),
            signals: AtomicU32::new(0),
            address: AtomicU64::new(address.pack()),
            priority: AtomicU32::new(0),
        }
    }

    pub(super) fn address(&self) -> Address {
        Address::unpack(self.address.load(Ordering::SeqCst))
    }

    pub(super) fn set_address(&self, address: Address) {
        self.address.store(address.pack(), Ordering::SeqCst);
    }

    pub(super) fn priority(&self) -> u32 {
        self.priority.load(Ordering::Relaxed)
    }

    pub(super) fn set_priority(&self, priority: u32) {
        self.priority.store(priority, Ordering::Relaxed);
    }

    /// Leaves a message. The vCPU's attention is the caller's to get.
    pub(super) fn post(&self, mode: Mode, vector: u8, level: bool) {
        let update = |change: &dyn Fn(u32) -> u32| {
            // The closure always gives a value, so that the update cannot fail.
            let _ = self.signals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| Some(change(old)));
        };
        match mode {
            Mode::Fixed => {
                let (word, bit) = Vectors::place(vector);
                // First, so that whoever takes the vector finds its trigger mode.
                if level {
                    self.levels[word].fetch_or(bit, Ordering::SeqCst);
                } else {
                    self.levels[word].fetch_and(!bit, Ordering::SeqCst);
                }
                self.vectors[word].fetch_or(bit, Ordering::SeqCst);
            }
            Mode::Nmi => update(&|old| old | NMI),
            Mode::Init => update(&|old| old & NMI | INIT),
            Mode::Sipi => update(&|old| old & (NMI | INIT) | SIPI | u32::from(vector) << SIPI_VECTOR),
        }
    }

    /// Leaves an INIT that a restored state had waiting.
    pub(in crate::soft) fn post_init(&self) {
        self.post(Mode::Init, 0, false);
    }

    fn decode(signals: u32) -> Signals {
        #[expect(clippy::cast_possible_truncation, reason = "the field is cut out")]
        let vector = (signals >> SIPI_VECTOR) as u8;
        Signals {
            nmi: signals & NMI != 0,
            init: signals & INIT != 0,
            sipi: (signals & SIPI != 0).then_some(vector),
        }
    }

    /// Takes what is not an interrupt.
    pub(super) fn take_signals(&self) -> Signals {
        Self::decode(self.signals.swap(0, Ordering::SeqCst))
    }

    /// What [`Posted::take_signals`] would give.
    pub(in crate::soft) fn signals(&self) -> Signals {
        Self::decode(self.signals.load(Ordering::SeqCst))
    }

    /// Takes the interrupts: which, and which of them are level-triggered.
    pub(super) fn take_vectors(&self) -> (Vectors, Vectors) {
        let vectors = Vectors(std::array::from_fn(|n| match self.vectors[n].load(Ordering::Relaxed) {
            0 => 0,
            _ => self.vectors[n].swap(0, Ordering::SeqCst),
        }));
        (vectors, self.levels())
    }

    /// What [`Posted::take_vectors`] would give.
    pub(super) fn vectors(&self) -> (Vectors, Vectors) {
        (Vectors(std::array::from_fn(|n| self.vectors[n].load(Ordering::SeqCst))), self.levels())
    }

    fn levels(&self) -> Vectors {
        Vectors(std::array::from_fn(|n| self.levels[n].load(Ordering::SeqCst)))
    }
}
