//! The real-time clock and its memory on a PC's ports (IBM PC/AT Technical Reference, "Real-Time
//! Clock").

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmcore::boot::acpi::{AcpiDevice, AcpiHid, AcpiResource};
use vmcore::{Attach, BusDevice, Error, EventSet, GuestMemory, IoThread, IrqLine, Machine, Result};

use super::registers;
use super::rtc::Rtc;
use crate::saved;
use crate::timer::Timer;

const PORT: u16 = 0x70;
const PORTS: u16 = 2;
const GSI: u32 = 8;

/// The selecting port's uppermost bit masks NMIs; the register is in the others.
const REGISTER: u8 = 0x7f;

/// The least time between two interrupts.
const SHORTEST: Duration = Duration::from_micros(100);

const WHAT: &str = "a real-time clock";
const VERSION: u8 = 1;

/// The real-time clock (Motorola MC146818A) and its 128 bytes of memory at ports 0x70 and 0x71,
/// interrupt 8: the host's time in UTC, with alarm, periodic and update interrupts.
///
/// The memory has what a BIOS leaves there for programs that look: the sizes of RAM, and the
/// checksum. What a guest sets the clock to counts for that guest alone.
pub struct Cmos {
    /// The machine's unless said.
    clock: Option<Clock>,
}

/// Tells the time since 1970 in UTC.
type Clock = Box<dyn Fn() -> Duration + Send>;

impl Cmos {
    /// A clock that shows the host's time, or a deterministic machine's.
    pub fn new() -> Self {
        Self { clock: None }
    }

    /// A clock that shows the time that `clock` tells, as UTC since 1970.
    pub fn with_clock(clock: impl Fn() -> Duration + Send + 'static) -> Self {
        Self { clock: Some(Box::new(clock)) }
    }

    /// Puts the clock on `machine`. Without a `thread` it does not interrupt.
    pub(crate) fn attach_with(self, machine: &mut Machine, thread: Option<&IoThread>) -> Result<()> {
        let time = machine.clock();
        let shown = time.clone();
        let clock = self.clock.unwrap_or_else(|| Box::new(move || shown.time_of_day()));
        let mut device = Device::new(clock, machine.irq_line(GSI));
        device.describe_memory(&ram(machine.memory()));
        let device = Arc::new(Mutex::new(device));
        // Weak, as the device keeps the timer.
        let served = Arc::downgrade(&device);
        let settle = move || served.upgrade().into_iter().for_each(|device| lock(&device).settle());
        if let Some(timer) = machine.timer(settle) {
            lock(&device).timer = Some(Alarm::Machine(timer, time));
        }
        if let Some(thread) = thread {
            let timer = Timer::new().map_err(|e| Error::os("timerfd_create", WHAT, e))?;
            lock(&device).timer = Some(Alarm::Host(timer.clone()));
            let served = device.clone();
            let watch =
                thread.watch(Arc::new(timer), EventSet::IN | EventSet::EDGE_TRIGGERED, move |_| {
                    lock(&served).settle();
                })?;
            machine.keep(watch);
        }
        machine.ports(PORT, PORTS, device)?;
        machine.describe(AcpiDevice {
            name: "RTC0".into(),
            hid: AcpiHid::Eisa("PNP0B00".into()),
            uid: 0,
            resources: vec![
                AcpiResource::Ports { base: PORT, len: PORTS },
                AcpiResource::Irq { gsi: GSI, level: false, shared: false },
            ],
        });
        Ok(())
    }
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Cmos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cmos").finish_non_exhaustive()
    }
}

impl Attach for Cmos {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let threaded = machine.has_irqchip() && !machine.is_deterministic();
        let thread = if threaded { Some(machine.io_thread("rtc")?) } else { None };
        self.attach_with(machine, thread.as_ref())
    }
}

/// Where memory begins and ends, in bytes.
fn ram(memory: &GuestMemory) -> Vec<(u64, u64)> {
    memory.ranges().iter().map(|range| (range.base, range.base.saturating_add(range.len))).collect()
}

#[derive(Clone, Serialize, Deserialize)]
struct State {
    selected: u8,
    rtc: Rtc,
}

struct Device {
    state: State,
    clock: Clock,
    irq: IrqLine,
    timer: Option<Alarm>,
}

/// What wakes the device.
enum Alarm {
    /// For an I/O thread that waits for it.
    Host(Timer),
    /// In the time of a deterministic machine.
    Machine(vmcore::Timer, vmcore::Clock),
}

impl Device {
    fn new(clock: Clock, irq: IrqLine) -> Self {
        let rtc = Rtc::new(clock());
        Self { state: State { selected: 0, rtc }, clock, irq, timer: None }
    }

    /// Fills in what a BIOS leaves in the memory.
    fn describe_memory(&mut self, ram: &[(u64, u64)]) {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        // How much memory there is from one address to another, in units, as far as bytes can tell.
        let size = |from: u64, to: u64, unit: u64, most: u64| {
            let bytes = |(base, end): &(u64, u64)| (*end).min(to).saturating_sub((*base).max(from));
            (ram.iter().map(bytes).sum::<u64>() / unit).min(most).to_le_bytes()
        };
        let base = size(0, 640 << 10, 1 << 10, 640);
        let extended = size(MIB, 4 * GIB, 1 << 10, 0xffff);
        let above_16m = size(16 * MIB, 4 * GIB, 64 << 10, 0xffff);
        let above_4g = size(4 * GIB, u64::MAX, 64 << 10, 0xff_ffff);
        let mut set = |first: u8, bytes: &[u8]| {
            (first..).zip(bytes).for_each(|(register, byte)| self.state.rtc.set(register, *byte));
        };
        // Equipment: a coprocessor.
        let equipment = 0x02;
        set(0x14, &[equipment]);
        set(0x15, &base[..2]);
        set(0x17, &extended[..2]);
        set(0x30, &extended[..2]);
        set(0x34, &above_16m[..2]);
        set(0x5b, &above_4g[..3]);
        // The sum of bytes 0x10 to 0x2D, of which the others are 0; upper byte first.
        let sum: u16 = [equipment, base[0], base[1], extended[0], extended[1]].map(u16::from).iter().sum();
        set(0x2e, &sum.to_be_bytes());
    }

    /// Brings interrupt and timer to what the registers say now.
    fn settle(&mut self) {
        let now = (self.clock)();
        self.state.rtc.look(now);
        let interrupt = self.state.rtc.interrupt();
        self.irq.set_level(interrupt);
        let Some(timer) = &self.timer else { return };
        // What has interrupted does so again only after it was read: until then nothing comes.
        let next = if interrupt { None } else { self.state.rtc.next_event(now) };
        let wait = next.map(|at| at.saturating_sub(now).max(SHORTEST));
        match timer {
            Alarm::Host(timer) => {
                if let Err(e) = wait.map_or_else(|| timer.stop(), |wait| timer.set(wait)) {
                    log::error!("the real-time clock does not interrupt: timerfd_settime: {e}");
                }
            }
            Alarm::Machine(timer, clock) => timer.set(wait.map(|wait| clock.now().saturating_add(wait))),
        }
    }
}

impl BusDevice for Device {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in registers(offset, data.len()).zip(data) {
            *byte = match port {
                1 => self.state.rtc.read(self.state.selected, (self.clock)()),
                _ => 0xff,
            };
            if port == 1 && self.state.selected == super::rtc::C {
                self.settle();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, byte) in registers(offset, data.len()).zip(data) {
            match port {
                0 => self.state.selected = byte & REGISTER,
                1 => {
                    self.state.rtc.write(self.state.selected, *byte, (self.clock)());
                    self.settle();
                }
                _ => {}
            }
        }
    }

    fn save(&self) -> Result<Vec<u8>> {
        saved::save(WHAT, VERSION, &self.state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let state: State = saved::restore(WHAT, VERSION, state)?;
        if !state.rtc.is_valid() || state.selected > REGISTER {
            return Err(Error::State {
                what: WHAT,
                expected: "128 bytes of memory and a time within 30,000 years".into(),
                found: "others".into(),
            });
        }
        self.state = state;
        self.settle();
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
    use std::sync::mpsc;
    use vmcore::{IrqSink, Msi};

    fn device() -> Device {
        // Friday, 13 February 2009, 23:31:30 UTC.
        Device::new(Box::new(|| Duration::from_secs(1_234_567_890)), IrqLine::detached())
    }

    fn get(device: &mut Device, register: u8) -> u8 {
        let mut data = [0];
        device.write(0, &[register]);
        device.read(1, &mut data);
        data[0]
    }

    #[test]
    fn registers_are_reached_through_the_ports() {
        let mut device = device();
        assert_eq!([9, 8, 7, 4, 2, 0].map(|r| get(&mut device, r)), [0x09, 0x02, 0x13, 0x23, 0x31, 0x30]);
        assert_eq!(get(&mut device, 0x80 | 9), 0x09, "with NMIs masked");
        // One 16-bit write selects and writes.
        device.write(0, &[0x0f, 0x55, 0xff]);
        let mut data = [0; 4];
        device.read(0, &mut data);
        assert_eq!(data, [0xff, 0x55, 0xff, 0xff]);
    }

    #[test]
    fn the_memory_tells_how_much_ram_there_is() {
        let mut device = device();
        let word = |device: &mut Device, low: u8| u16::from_le_bytes([low, low + 1].map(|r| get(device, r)));
        device.describe_memory(&[(0, 8 << 20)]);
        assert_eq!([0x15, 0x17, 0x30, 0x34].map(|r| word(&mut device, r)), [640, 7 << 10, 7 << 10, 0]);
        device.describe_memory(&[(0, 3 << 30), (4 << 30, 7 << 30)]);
        assert_eq!([0x15, 0x17, 0x30, 0x34].map(|r| word(&mut device, r)), [640, 0xffff, 0xffff, 0xbf00]);
        assert_eq!([0x5b, 0x5c, 0x5d].map(|r| get(&mut device, r)), [0x00, 0xc0, 0x00]);
        let sum = (0x10..=0x2d).map(|r| u16::from(get(&mut device, r))).sum::<u16>();
        assert_eq!([0x2e, 0x2f].map(|r| get(&mut device, r)), sum.to_be_bytes());
    }

    #[test]
    fn interrupts_come_on_the_hosts_time() {
        struct Bell(Mutex<mpsc::Sender<bool>>);
        impl IrqSink for Bell {
            fn set_irq(&self, _: u32, high: bool) -> Result<()> {
                self.0.lock().unwrap().send(high).unwrap();
                Ok(())
            }
            fn send_msi(&self, _: Msi) -> Result<()> {
                Ok(())
            }
        }
        let (sender, rings) = mpsc::channel();
        let irq = IrqLine::new(Arc::new(Bell(Mutex::new(sender))), GSI);
        let host = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let device = Arc::new(Mutex::new(Device::new(Box::new(host), irq)));
        let thread = IoThread::new("rtc").unwrap();
        let timer = Timer::new().unwrap();
        lock(&device).timer = Some(Alarm::Host(timer.clone()));
        let served = device.clone();
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let _watch = thread.watch(Arc::new(timer), events, move |_| lock(&served).settle()).unwrap();
        let next = || rings.recv_timeout(Duration::from_secs(20)).unwrap();

        lock(&device).write(0, &[0x0b, 0x42]);
        for _ in 0..5 {
            assert!(next(), "a period is over");
            assert_eq!(get(&mut lock(&device), 0x0c) & 0xc0, 0xc0);
            assert!(!next(), "acknowledged");
        }
        lock(&device).write(0, &[0x0b, 0x12]);
        get(&mut lock(&device), 0x0c);
        while !next() {}
        assert_eq!(get(&mut lock(&device), 0x0c) & 0x90, 0x90, "a second has ended");
    }

    #[test]
    fn state_is_restored_and_bad_state_refused() {
        let mut before = device();
        before.write(0, &[0x40, 7]);
        let saved = before.save().unwrap();
        let mut after = device();
        after.restore(&saved).unwrap();
        let mut data = [0];
        after.read(1, &mut data);
        assert_eq!(data, [7]);
        let mut short = before.state.clone();
        short.rtc =
            postcard::from_bytes(&postcard::to_allocvec(&(vec![0u8; 9], 0i64, 0u8, Duration::ZERO)).unwrap())
                .unwrap();
        assert!(after.restore(&saved::save(WHAT, VERSION, &short).unwrap()).is_err());
        assert!(after.restore(&saved[..20]).is_err());
    }

    proptest! {
        #[test]
        fn no_access_breaks_it(accesses in prop::collection::vec((any::<u64>(), 0..4u64, any::<bool>(), any::<[u8; 8]>(), 0..=8usize), 0..200)) {
            let mut device = device();
            for (anywhere, near, write, mut data, len) in accesses {
                let offset = if anywhere % 16 == 0 { anywhere } else { near };
                if write {
                    device.write(offset, &data[..len]);
                } else {
                    device.read(offset, &mut data[..len]);
                }
            }
            let saved = device.save().unwrap();
            device.restore(&saved).unwrap();
        }
    }
}
