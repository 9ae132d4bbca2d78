//! The ACPI fixed hardware: power button, soft-off, PM timer (ACPI 6.5, 4.8).

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmcore::boot::acpi::PowerPorts;
use vmcore::{Attach, BusDevice, Control, IrqLine, Machine, Outcome, Result};

use super::reset::ResetControl;
use crate::saved;

/// Where the blocks are, and how many ports they have together.
const BASE: u16 = 0x600;
const PORTS: u16 = 12;
/// Offsets of the registers from `BASE`: PM1a status, enable, control (16 bits each), timer (32).
const ENABLE: usize = 2;
const CONTROL: usize = 4;
const TIMER: usize = 8;

const SCI: u32 = 9;

/// PM1 status and enable: the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 enable: timer, global lock, power button, sleep button, RTC.
const ENABLES: u16 = 1 << 0 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;

/// PM1 control: ACPI owns the machine, as it always does here.
const SCI_ENABLED: u16 = 1 << 0;
/// PM1 control, upper byte: sleep type and "sleep now".
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0x7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// The sleep type that means soft-off.
const S5: u8 = 5;

/// The PM timer's frequency in Hz.
const TIMER_HZ: u64 = 3_579_545;

const WHAT: &str = "the ACPI power block";
const VERSION: u8 = 1;

/// The ACPI fixed hardware at ports 0x600 to 0x60B with its interrupt 9, and the reset register at
/// port 0xCF9: by these the guest switches itself off and resets itself, and is told of the power
/// button. The PM timer has 32 bits.
///
/// There is no other sleep than soft-off, and the timer's overflow does not interrupt.
pub struct AcpiPower {
    device: Arc<Mutex<Device>>,
    /// Once it is on a machine the timer goes with that one's time.
    machines_clock: bool,
}

impl AcpiPower {
    /// The power block of one machine.
    pub fn new() -> Self {
        let begin = Instant::now();
        Self { machines_clock: true, ..Self::with_clock(move || begin.elapsed()) }
    }

    /// As [`AcpiPower::new`], with the PM timer driven by `clock`, which never goes back.
    pub fn with_clock(clock: impl Fn() -> Duration + Send + 'static) -> Self {
        let device = Device {
            state: State::default(),
            clock: Box::new(clock),
            irq: IrqLine::detached(),
            control: Control::detached(),
        };
        Self { device: Arc::new(Mutex::new(device)), machines_clock: false }
    }

    /// The machine's power button.
    pub fn button(&self) -> PowerButton {
        PowerButton(Arc::downgrade(&self.device))
    }
}

impl Default for AcpiPower {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for AcpiPower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcpiPower").finish_non_exhaustive()
    }
}

impl Attach for AcpiPower {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        Box::new(ResetControl).attach(machine)?;
        {
            let mut device = lock(&self.device);
            device.irq = machine.irq_line(SCI);
            device.control = machine.control();
            if self.machines_clock {
                let clock = machine.clock();
                device.clock = Box::new(move || clock.now());
            }
            device.update();
        }
        machine.ports(BASE, PORTS, self.device)?;
        machine.describe_power(PowerPorts {
            pm1_event: BASE,
            pm1_control: BASE + 4,
            pm_timer: Some(BASE + 8),
            sci: SCI,
            reset_port: ResetControl::PORT,
            reset_value: ResetControl::VALUE,
            s5_type: S5,
        })
    }
}

/// A machine's power button. Clones are the same button; it may be pressed from any thread, and
/// does not keep the machine alive.
#[derive(Clone)]
pub struct PowerButton(Weak<Mutex<Device>>);

impl PowerButton {
    /// Presses it: a guest that listens shuts down in its own way. One that does not listen yet
    /// learns of it when it does. Returns whether the machine is still there.
    pub fn press(&self) -> bool {
        let Some(device) = self.0.upgrade() else { return false };
        let mut device = lock(&device);
        device.state.status |= POWER_BUTTON;
        device.update();
        true
    }
}

impl fmt::Debug for PowerButton {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PowerButton")
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    status: u16,
    enable: u16,
    /// Sleep type that was written, bits 10 to 12 of PM1 control.
    sleep_type: u8,
    /// What to add to the clock for the PM timer's time, in ns, modulo 2^64.
    timer_offset: u64,
}

struct Device {
    state: State,
    clock: Box<dyn Fn() -> Duration + Send>,
    irq: IrqLine,
    control: Control,
}

impl Device {
    fn update(&self) {
        self.irq.set_level(self.state.status & self.state.enable != 0);
    }

    fn clock(&self) -> u64 {
        u64::try_from((self.clock)().as_nanos()).unwrap_or(u64::MAX)
    }

    fn timer(&self) -> u32 {
        let ns = self.clock().wrapping_add(self.state.timer_offset);
        let ticks = u128::from(ns) * u128::from(TIMER_HZ) / 1_000_000_000;
        u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or(0)
    }

    /// The registers as the guest sees them.
    fn image(&self) -> [u8; PORTS as usize] {
        let mut image = [0; PORTS as usize];
        let control = SCI_ENABLED | u16::from(self.state.sleep_type) << (8 + SLEEP_TYPE_SHIFT);
        image[..ENABLE].copy_from_slice(&self.state.status.to_le_bytes());
        image[ENABLE..CONTROL].copy_from_slice(&self.state.enable.to_le_bytes());
        image[CONTROL..CONTROL + 2].copy_from_slice(&control.to_le_bytes());
        image[TIMER..].copy_from_slice(&self.timer().to_le_bytes());
        image
    }

    fn write_byte(&mut self, register: usize, value: u8) {
        let low = u16::from(value);
        let state = &mut self.state;
        match register {
            // Writing ones clears.
            0 => state.status &= !low,
            1 => state.status &= !(low << 8),
            ENABLE => state.enable = (state.enable & 0xff00) | (low & ENABLES),
            3 => state.enable = (state.enable & 0x00ff) | ((low << 8) & ENABLES),
            5 => {
                state.sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
                match (value & SLEEP_ENABLE != 0, state.sleep_type) {
                    (true, S5) => self.control.end(Outcome::PowerOff),
                    (true, other) => log::warn!("the guest asks for sleep type {other}, there is only {S5}"),
                    (false, _) => {}
                }
            }
            _ => {}
        }
    }
}

impl BusDevice for Device {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = image.get(at.saturating_add(index)).copied().unwrap_or(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter().enumerate() {
            self.write_byte(at.saturating_add(index), *byte);
        }
        self.update();
    }

    fn save(&self) -> Result<Vec<u8>> {
        let timer_offset = self.state.timer_offset.wrapping_add(self.clock());
        saved::save(WHAT, VERSION, &State { timer_offset, ..self.state.clone() })
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let mut state: State = saved::restore(WHAT, VERSION, state)?;
        state.timer_offset = state.timer_offset.wrapping_sub(self.clock());
        state.sleep_type &= SLEEP_TYPE_MASK;
        self.state = state;
        self.update();
        Ok(())
    }
}

fn lock(device: &Mutex<Device>) -> MutexGuard<'_, Device> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn power(clock: &Arc<AtomicU64>) -> AcpiPower {
        let clock = clock.clone();
        AcpiPower::with_clock(move || Duration::from_nanos(clock.load(Ordering::SeqCst)))
    }

    fn read<const N: usize>(power: &AcpiPower, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        lock(&power.device).read(offset, &mut data);
        data
    }

    #[test]
    fn soft_off_needs_type_and_enable() {
        let power = AcpiPower::new();
        let control = lock(&power.device).control.clone();
        // As Linux does it: the type first, then again with the bit.
        lock(&power.device).write(4, &0x1401u16.to_le_bytes());
        assert_eq!((read(&power, 4), control.asked()), (0x1401u16.to_le_bytes(), None));
        lock(&power.device).write(4, &0x2401u16.to_le_bytes());
        assert_eq!(control.asked(), None, "there is no sleep type 1");
        lock(&power.device).write(4, &0x3401u16.to_le_bytes());
        assert_eq!(control.asked(), Some(Outcome::PowerOff));
        // ACPI stays on whatever is written.
        lock(&power.device).write(4, &[0, 0]);
        assert_eq!(read(&power, 4), [1, 0]);
    }

    #[test]
    fn the_button_interrupts_until_it_is_acknowledged() {
        let power = AcpiPower::new();
        let button = power.button();
        assert!(button.press());
        assert!(!lock(&power.device).irq.level(), "nobody listens");
        lock(&power.device).write(2, &0x0100u16.to_le_bytes());
        assert!(lock(&power.device).irq.level());
        assert_eq!(read(&power, 0), [0, 1, 0, 1]);
        lock(&power.device).write(0, &[0xff, 0]);
        assert!(lock(&power.device).irq.level(), "another bit acknowledges nothing");
        lock(&power.device).write(0, &0x0100u16.to_le_bytes());
        assert!(!lock(&power.device).irq.level());
        drop(power);
        assert!(!button.press());
    }

    #[test]
    fn the_timer_runs_at_its_frequency_and_wraps_at_32_bits() {
        let clock = Arc::new(AtomicU64::new(0));
        let power = power(&clock);
        let at = |ns| {
            clock.store(ns, Ordering::SeqCst);
            u32::from_le_bytes(read(&power, 8))
        };
        assert_eq!(at(0), 0);
        assert_eq!(at(1_000_000_000), 3_579_545);
        assert_eq!(at(1_199_864_031_881), u32::MAX);
        assert_eq!(at(1_199_864_031_882), 0);
        assert_eq!(at(u64::MAX), u32::from_le_bytes(read(&power, 8)));
        lock(&power.device).write(8, &[1, 2, 3, 4]);
        assert_eq!(at(0), 0, "it cannot be written");
    }

    #[test]
    fn a_restored_timer_goes_on_from_where_it_was() {
        let (early, late) = (Arc::new(AtomicU64::new(5_000_000)), Arc::new(AtomicU64::new(77_000_000_000)));
        let (before, after) = (power(&early), power(&late));
        lock(&before.device).write(2, &0x0100u16.to_le_bytes());
        before.button().press();
        let saved = lock(&before.device).save().unwrap();
        lock(&after.device).restore(&saved).unwrap();
        assert_eq!(read::<12>(&after, 0), read::<12>(&before, 0));
        assert!(lock(&after.device).irq.level());
        early.fetch_add(1_000_000, Ordering::SeqCst);
        late.fetch_add(1_000_000, Ordering::SeqCst);
        assert_eq!(read::<4>(&after, 8), read::<4>(&before, 8));
        assert!(lock(&after.device).restore(&saved[1..]).is_err());
    }

    proptest! {
        #[test]
        fn no_access_breaks_it(accesses in prop::collection::vec((any::<u64>(), 0..16u64, any::<bool>(), any::<[u8; 8]>(), 0..=8usize), 0..200)) {
            let power = AcpiPower::new();
            let mut device = lock(&power.device);
            for (anywhere, near, write, mut data, len) in accesses {
                let offset = if anywhere % 16 == 0 { anywhere } else { near };
                if write {
                    device.write(offset, &data[..len]);
                } else {
                    device.read(offset, &mut data[..len]);
                }
                prop_assert_eq!(device.irq.level(), device.state.status & device.state.enable != 0);
                let control = device.image()[CONTROL];
                prop_assert_eq!(control & 1, 1);
            }
        }
    }
}
