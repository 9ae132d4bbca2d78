//! A serial port: a 16550A UART with a console on its line.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmcore::boot::acpi::{AcpiDevice, AcpiHid, AcpiResource};
use vmcore::{Attach, BusDevice, Error, IoThread, IrqLine, Machine, Result};

use super::registers;
use super::uart::{Uart, Written};
use crate::console::{Console, Input, Link};
use crate::saved;

/// How many ports a UART has.
const PORTS: u16 = 8;

const WHAT: &str = "a serial port";
const VERSION: u8 = 1;

/// A serial port to be attached: a 16550A UART (PC16550D data sheet) with a [`Console`] on its line.
///
/// ```
/// use vmcore::Vm;
/// use vmdevices::console;
/// use vmdevices::legacy::Serial;
///
/// let (console, script) = console::memory()?;
/// let builder = Vm::builder().attach(Serial::com1(console));
/// # Ok::<(), vmcore::Error>(())
/// ```
///
/// Output goes to the console as the guest writes it, on the vCPU's thread. Input waits with the
/// host until the guest listens (it enables the interrupt for received data, or polls the line
/// status), and comes only as fast as the guest reads it: none is lost. What a guest clears from the
/// receiver unread it gets again when it listens.
///
/// On a deterministic machine the guest's input is what the console has when the VM is built, up to
/// 64 KiB; what comes later is not read.
pub struct Serial {
    link: Link,
    name: &'static str,
    uid: u32,
    base: u16,
    gsi: u32,
}

impl Serial {
    /// COM1: ports from 0x3F8, interrupt 4. Linux calls it ttyS0.
    pub fn com1(console: impl Console + 'static) -> Self {
        Self { link: Link::new(console), name: "COM1", uid: 1, base: 0x3f8, gsi: 4 }
    }

    /// COM2: ports from 0x2F8, interrupt 3.
    pub fn com2(console: impl Console + 'static) -> Self {
        Self { link: Link::new(console), name: "COM2", uid: 2, base: 0x2f8, gsi: 3 }
    }

    /// COM3: ports from 0x3E8, interrupt 4 as COM1 has.
    pub fn com3(console: impl Console + 'static) -> Self {
        Self { link: Link::new(console), name: "COM3", uid: 3, base: 0x3e8, gsi: 4 }
    }

    /// COM4: ports from 0x2E8, interrupt 3 as COM2 has.
    pub fn com4(console: impl Console + 'static) -> Self {
        Self { link: Link::new(console), name: "COM4", uid: 4, base: 0x2e8, gsi: 3 }
    }

    /// Whether it needs an I/O thread on the host.
    pub(crate) fn needs_thread(&mut self) -> bool {
        self.link.ready();
        self.link.needs_thread()
    }

    /// Puts the port on `machine`, with `thread` to wait for the console.
    pub(crate) fn attach_with(mut self, machine: &mut Machine, thread: Option<&IoThread>) -> Result<()> {
        self.link.set_control(machine.control());
        if machine.is_deterministic() {
            self.link.end_input();
        }
        let device = Arc::new(Mutex::new(SerialDevice::new(self.link, machine.irq_line(self.gsi))));
        machine.ports(self.base, PORTS, device.clone())?;
        machine.describe(AcpiDevice {
            name: self.name.into(),
            hid: AcpiHid::Eisa("PNP0501".into()),
            uid: self.uid,
            resources: vec![
                AcpiResource::Ports { base: self.base, len: PORTS },
                AcpiResource::Irq { gsi: self.gsi, level: false, shared: false },
            ],
        });
        if let Some(thread) = thread {
            let served = device.clone();
            let ready = move || served.lock().unwrap_or_else(PoisonError::into_inner).ready();
            let watches = device.lock().unwrap_or_else(PoisonError::into_inner).link.watch(thread, ready)?;
            machine.keep(watches);
        }
        Ok(())
    }
}

impl Attach for Serial {
    fn attach(mut self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let threaded = self.needs_thread() && !machine.is_deterministic();
        let thread = if threaded { Some(machine.io_thread("console")?) } else { None };
        self.attach_with(machine, thread.as_ref())
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("name", &self.name).field("link", &self.link).finish_non_exhaustive()
    }
}

/// The serial port on the bus.
struct SerialDevice {
    uart: Uart,
    link: Link,
    irq: IrqLine,
}

#[derive(Serialize, Deserialize)]
struct State {
    uart: Uart,
    /// Input that was read ahead of the guest.
    unread: Vec<u8>,
}

impl SerialDevice {
    fn new(link: Link, irq: IrqLine) -> Self {
        Self { uart: Uart::new(), link, irq }
    }

    /// The host has input or takes output.
    fn ready(&mut self) {
        self.link.ready();
        self.update();
    }

    /// Moves input to the UART while it has room, and sets the interrupt.
    fn update(&mut self) {
        let mut buffer = [0; 16];
        loop {
            let room = self.uart.room().min(buffer.len());
            if room == 0 {
                break;
            }
            match self.link.read(&mut buffer[..room]) {
                Input::Bytes(count) => {
                    buffer.iter().take(count).for_each(|byte| self.uart.receive(*byte));
                }
                Input::Break => self.uart.receive_break(),
                Input::Nothing | Input::End | Input::Quit => break,
            }
        }
        self.irq.set_level(self.uart.interrupt());
    }
}

impl BusDevice for SerialDevice {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in registers(offset, data.len()).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |register| self.uart.read(register));
        }
        self.update();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, byte) in registers(offset, data.len()).zip(data) {
            let Ok(register) = u8::try_from(register) else { break };
            match self.uart.write(register, *byte) {
                Written::Nothing => {}
                Written::Sent(byte) => self.link.write(&[byte]),
                Written::Cleared(bytes) => self.link.put_back(&bytes),
            }
        }
        self.update();
    }

    fn save(&self) -> Result<Vec<u8>> {
        saved::save(WHAT, VERSION, &State { uart: self.uart.clone(), unread: self.link.unread() })
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let State { uart, unread } = saved::restore(WHAT, VERSION, state)?;
        if !uart.is_valid() {
            return Err(Error::State {
                what: WHAT,
                expected: "at most 16 bytes in the receiver and a trigger level of 1, 4, 8 or 14".into(),
                found: format!("{uart:?}"),
            });
        }
        self.uart = uart;
        self.link.set_unread(&unread);
        self.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::{self, Script};
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use vmcore::{IrqSink, Msi};

    /// Counts edges.
    #[derive(Default)]
    struct Edges(AtomicUsize);

    impl IrqSink for Edges {
        fn set_irq(&self, _: u32, high: bool) -> Result<()> {
            self.0.fetch_add(usize::from(high), Ordering::SeqCst);
            Ok(())
        }
        fn send_msi(&self, _: Msi) -> Result<()> {
            Ok(())
        }
    }

    fn port() -> (SerialDevice, Script, Arc<Edges>) {
        let (console, script) = console::memory().unwrap();
        let edges = Arc::new(Edges::default());
        (SerialDevice::new(Link::new(console), IrqLine::new(edges.clone(), 4)), script, edges)
    }

    fn read(port: &mut SerialDevice, register: u64) -> u8 {
        let mut data = [0];
        port.read(register, &mut data);
        data[0]
    }

    /// As a driver starts it, with interrupts for received data.
    fn start(port: &mut SerialDevice) {
        for (register, value) in [(1, 0), (2, 7), (3, 3), (4, 0xb), (1, 1)] {
            port.write(register, &[value]);
        }
    }

    #[test]
    fn output_is_there_at_once() {
        let (mut port, script, _) = port();
        port.write(0, b"A");
        assert_eq!(script.transcript(), "A");
    }

    #[test]
    fn input_typed_before_the_driver_starts_is_not_lost() {
        let (mut port, script, edges) = port();
        script.send("root\n").unwrap();
        port.ready();
        assert_eq!(read(&mut port, 5) & 1, 0);
        start(&mut port);
        assert_eq!(edges.0.load(Ordering::SeqCst), 1);
        let text = [(); 5].map(|()| read(&mut port, 0));
        assert_eq!(&text, b"root\n");
        assert!(!port.irq.level());
        // The driver closes and opens again with input unread.
        script.send("more").unwrap();
        port.ready();
        port.write(1, &[0]);
        port.write(2, &[7]);
        assert_eq!((read(&mut port, 0), read(&mut port, 5) & 1), (0, 0));
        start(&mut port);
        assert_eq!([(); 4].map(|()| read(&mut port, 0)), *b"more");
    }

    #[test]
    fn each_acknowledged_interrupt_is_followed_by_a_new_edge() {
        let (mut port, script, edges) = port();
        start(&mut port);
        for round in 1..=3 {
            script.send("x").unwrap();
            port.ready();
            assert_eq!(edges.0.load(Ordering::SeqCst), round);
            assert_eq!(read(&mut port, 2) & 0xf, 4);
            assert_eq!(read(&mut port, 0), b'x');
            assert!(!port.irq.level());
        }
        port.write(1, &[3]);
        for round in 5..=7 {
            assert_eq!(read(&mut port, 2) & 0xf, 2);
            port.write(0, b"y");
            assert_eq!(edges.0.load(Ordering::SeqCst), round);
        }
    }

    #[test]
    fn wide_accesses_reach_register_after_register() {
        let (mut port, script, _) = port();
        port.write(0, b"A\x01\x07\x03");
        assert_eq!(script.transcript(), "A");
        let mut data = [0; 4];
        port.read(0, &mut data);
        assert_eq!(data, [0, 1, 0xc1, 3]);
        port.write(7, &[0x11, 2, 3, 4]);
        port.read(7, &mut data);
        assert_eq!(data, [0x11, 0xff, 0xff, 0xff]);
        port.read(u64::MAX, &mut data);
    }

    #[test]
    fn a_saved_port_goes_on_where_it_stopped() {
        let (mut before, script, _) = port();
        start(&mut before);
        before.write(7, &[0x5a]);
        let text: Vec<u8> = (0..100).collect();
        script.send(&text).unwrap();
        before.ready();
        let (mut after, _script, edges) = port();
        after.restore(&before.save().unwrap()).unwrap();
        assert_eq!((read(&mut after, 7), edges.0.load(Ordering::SeqCst)), (0x5a, 1));
        let got: Vec<u8> = (0..100).map(|_| read(&mut after, 0)).collect();
        assert_eq!(got, text);
        for bad in [&[][..], &[2, 0], &[1, 0], &[1; 2000]] {
            assert!(after.restore(bad).is_err());
        }
    }

    /// A mebibyte through the receiver with a reader that is slower than the sender, and takes it by
    /// interrupts alone.
    #[test]
    fn a_slow_reader_gets_every_byte() {
        let (console, script) = console::memory().unwrap();
        let port = Arc::new(Mutex::new(SerialDevice::new(Link::new(console), IrqLine::detached())));
        start(&mut port.lock().unwrap());
        let thread = IoThread::new("console").unwrap();
        let served = port.clone();
        let ready = move || served.lock().unwrap().ready();
        let _watches = port.lock().unwrap().link.watch(&thread, ready).unwrap();

        let text: Vec<u8> = (0..1u32 << 20).map(|i| i.wrapping_mul(0x9e37_79b9).to_be_bytes()[0]).collect();
        let sent = text.clone();
        let sender = std::thread::spawn(move || {
            for piece in sent.chunks(3001) {
                script.send(piece).unwrap();
            }
            script
        });
        let mut got = Vec::with_capacity(text.len());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while got.len() < text.len() {
            assert!(std::time::Instant::now() < deadline, "{} bytes came", got.len());
            let mut port = port.lock().unwrap();
            if !port.irq.level() {
                drop(port);
                std::thread::yield_now();
                continue;
            }
            while read(&mut port, 5) & 1 != 0 {
                got.push(read(&mut port, 0));
            }
            assert_eq!(read(&mut port, 5) & 2, 0, "no overrun");
        }
        assert!(got == text);
        assert_eq!(sender.join().unwrap().unread(), 0);
    }

    proptest! {
        #[test]
        fn no_access_breaks_it(
            accesses in prop::collection::vec((any::<u64>(), 0..12u64, 1..=8usize, any::<u64>(), 0..3u8), 0..100),
        ) {
            let (mut port, script, _) = port();
            for (anywhere, near, len, value, kind) in accesses {
                let offset = if anywhere % 16 == 0 { anywhere } else { near };
                let mut data = value.to_le_bytes();
                match kind {
                    0 => port.read(offset, &mut data[..len]),
                    1 => port.write(offset, &data[..len]),
                    _ => {
                        script.send(&data[..len]).unwrap();
                        port.ready();
                    }
                }
                prop_assert_eq!(port.irq.level(), port.uart.interrupt());
            }
            let saved = port.save().unwrap();
            port.restore(&saved).unwrap();
        }
    }
}
