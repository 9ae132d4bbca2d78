//! The keyboard controller and its reset line (Intel 8042 with the IBM PC/AT's firmware; IBM PC/AT
//! Technical Reference, section 4).
//!
//! It answers every command at once, so that no driver waits for a timeout, and has a keyboard on
//! it that answers too and never types. There is no second port for a mouse.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmcore::{Attach, BusDevice, Control, Error, IrqLine, Machine, Outcome, ResetCause, Result};

use crate::saved;

const DATA_PORT: u16 = 0x60;
const COMMAND_PORT: u16 = 0x64;
const GSI: u32 = 1;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// The self test has passed.
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_LAST_WAS_COMMAND: u8 = 1 << 3;
const STATUS_NOT_LOCKED: u8 = 1 << 4;

const CONFIG_INTERRUPT: u8 = 1 << 0;
const CONFIG_KEYBOARD_OFF: u8 = 1 << 4;

/// The line of output port and pulse commands that resets the processor while it is 0.
const NOT_RESET: u8 = 1 << 0;
const OUTPUT_PORT_A20: u8 = 1 << 1;

const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;

/// How many bytes wait to be read; more are dropped, as a keyboard does.
const QUEUE: usize = 16;

const WHAT: &str = "a keyboard controller";
const VERSION: u8 = 1;

/// The i8042 keyboard controller at ports 0x60 and 0x64, interrupt 1: kernels reset the machine by
/// its command 0xFE, which ends the VM with [`ResetCause::Keyboard`].
///
/// ACPI does not name it. So Linux does not look for a keyboard when it has ACPI (which saves the
/// time), and finds a working one when it has not; the reset works always.
#[derive(Clone, Copy, Debug, Default)]
pub struct I8042;

impl Attach for I8042 {
    fn attach(self: Box<Self>, machine: &mut Machine) -> Result<()> {
        let chip = Chip { state: State::default(), irq: machine.irq_line(GSI), control: machine.control() };
        let chip = Arc::new(Mutex::new(chip));
        machine.ports(DATA_PORT, 1, Arc::new(Mutex::new(DataPort(chip.clone()))))?;
        machine.ports(COMMAND_PORT, 1, Arc::new(Mutex::new(CommandPort(chip))))
    }
}

/// What the next byte at the data port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Next {
    /// The keyboard, as a command.
    Keyboard,
    /// The keyboard, as the parameter of the last command.
    Parameter,
    /// A byte of the controller's memory.
    Memory(u8),
    /// The output port.
    OutputPort,
    /// To be read back at the data port.
    Echo,
    /// The mouse, which is not there.
    Mouse,
}

#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// The controller's memory; byte 0 is its configuration.
    memory: [u8; 32],
    next: Next,
    last_was_command: bool,
    output: VecDeque<u8>,
}

impl Default for State {
    fn default() -> Self {
        let mut memory = [0; 32];
        // Keyboard on, no interrupt, scan codes translated, self test passed.
        memory[0] = 0x44;
        Self { memory, next: Next::Keyboard, last_was_command: false, output: VecDeque::new() }
    }
}

struct Chip {
    state: State,
    irq: IrqLine,
    control: Control,
}

impl Chip {
    fn answer(&mut self, bytes: &[u8]) {
        let room = QUEUE.saturating_sub(self.state.output.len());
        self.state.output.extend(bytes.iter().take(room));
        self.update();
    }

    fn update(&self) {
        let interrupts = self.state.memory[0] & CONFIG_INTERRUPT != 0;
        self.irq.set_level(interrupts && !self.state.output.is_empty());
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_SYSTEM | STATUS_NOT_LOCKED;
        if !self.state.output.is_empty() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.state.last_was_command {
            status |= STATUS_LAST_WAS_COMMAND;
        }
        status
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.state.output.pop_front().unwrap_or(0);
        // Each byte is an edge of its own.
        self.irq.set_level(false);
        self.update();
        byte
    }

    fn reset(&self) {
        self.control.end(Outcome::Reset(ResetCause::Keyboard));
    }

    fn command(&mut self, command: u8) {
        self.state.last_was_command = true;
        self.state.next = Next::Keyboard;
        let at = command & 0x1f;
        match command {
            0x20..=0x3f => self.answer(&[self.state.memory[usize::from(at)]]),
            0x60..=0x7f => self.state.next = Next::Memory(at),
            // Mouse port: test says "clock line stuck low", which means that there is none.
            0xa9 => self.answer(&[0x01]),
            // Self test passed; keyboard port works.
            0xaa => self.answer(&[0x55]),
            0xab => self.answer(&[0x00]),
            0xad => self.state.memory[0] |= CONFIG_KEYBOARD_OFF,
            0xae => self.state.memory[0] &= !CONFIG_KEYBOARD_OFF,
            // Input port: keyboard not locked.
            0xc0 => self.answer(&[0x80]),
            0xd0 => self.answer(&[NOT_RESET | OUTPUT_PORT_A20]),
            0xd1 => self.state.next = Next::OutputPort,
            0xd2 | 0xd3 => self.state.next = Next::Echo,
            0xd4 => self.state.next = Next::Mouse,
            // Test inputs: both lines low.
            0xe0 => self.answer(&[0x00]),
            0xf0..=0xff if command & NOT_RESET == 0 => self.reset(),
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.state.last_was_command = false;
        match std::mem::replace(&mut self.state.next, Next::Keyboard) {
            Next::Keyboard => self.keyboard(value),
            Next::Parameter => self.answer(&[ACKNOWLEDGE]),
            Next::Memory(at) => {
                self.state.memory[usize::from(at)] = value;
                self.update();
            }
            Next::OutputPort if value & NOT_RESET == 0 => self.reset(),
            Next::OutputPort => {}
            Next::Echo => self.answer(&[value]),
            Next::Mouse => self.answer(&[RESEND]),
        }
    }

    /// A command to the keyboard (IBM PS/2 Technical Reference, "Keyboard").
    fn keyboard(&mut self, command: u8) {
        match command {
            // LEDs, scan code set, repeat rate: a parameter follows.
            0xed | 0xf0 | 0xf3 => {
                self.state.next = Next::Parameter;
                self.answer(&[ACKNOWLEDGE]);
            }
            0xee => self.answer(&[0xee]),
            // An MF2 keyboard.
            0xf2 => self.answer(&[ACKNOWLEDGE, 0xab, 0x83]),
            0xf4..=0xf6 => self.answer(&[ACKNOWLEDGE]),
            // Reset, and its self test passes.
            0xff => self.answer(&[ACKNOWLEDGE, 0xaa]),
            _ => self.answer(&[RESEND]),
        }
    }
}

fn lock(chip: &Mutex<Chip>) -> MutexGuard<'_, Chip> {
    chip.lock().unwrap_or_else(PoisonError::into_inner)
}

struct DataPort(Arc<Mutex<Chip>>);

impl BusDevice for DataPort {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = lock(&self.0).read_data();
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        if let Some(byte) = data.first() {
            lock(&self.0).write_data(*byte);
        }
    }

    fn save(&self) -> Result<Vec<u8>> {
        saved::save(WHAT, VERSION, &lock(&self.0).state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let state: State = saved::restore(WHAT, VERSION, state)?;
        let at_most = |what: &str, found: usize| Error::State {
            what: WHAT,
            expected: format!("at most {what}"),
            found: found.to_string(),
        };
        if state.output.len() > QUEUE {
            return Err(at_most("16 bytes to be read", state.output.len()));
        }
        if let Next::Memory(at @ 32..) = state.next {
            return Err(at_most("byte 31 of its memory", at.into()));
        }
        let mut chip = lock(&self.0);
        chip.state = state;
        chip.update();
        Ok(())
    }
}

/// Its state is the data port's to save.
struct CommandPort(Arc<Mutex<Chip>>);

impl BusDevice for CommandPort {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = lock(&self.0).status();
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        if let Some(byte) = data.first() {
            lock(&self.0).command(*byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Ports {
        data: DataPort,
        command: CommandPort,
        control: Control,
    }

    impl Ports {
        fn new() -> Self {
            let control = Control::detached();
            let chip = Chip { state: State::default(), irq: IrqLine::detached(), control: control.clone() };
            let chip = Arc::new(Mutex::new(chip));
            Self { data: DataPort(chip.clone()), command: CommandPort(chip), control }
        }

        fn command(&mut self, command: u8) {
            self.command.write(0, &[command]);
        }

        fn send(&mut self, byte: u8) {
            self.data.write(0, &[byte]);
        }

        fn status(&mut self) -> u8 {
            let mut data = [0];
            self.command.read(0, &mut data);
            data[0]
        }

        /// All that can be read now.
        fn answers(&mut self) -> Vec<u8> {
            let mut answers = Vec::new();
            while self.status() & STATUS_OUTPUT_FULL != 0 {
                let mut data = [0];
                self.data.read(0, &mut data);
                answers.push(data[0]);
            }
            answers
        }
    }

    #[test]
    fn each_way_of_reset_ends_the_vm() {
        let reset = Some(Outcome::Reset(ResetCause::Keyboard));
        for command in [0xfe, 0xf0, 0xfc] {
            let mut ports = Ports::new();
            ports.command(command);
            assert_eq!(ports.control.asked(), reset, "{command:#x}");
        }
        let mut ports = Ports::new();
        for harmless in [0xff, 0xf1] {
            ports.command(harmless);
        }
        ports.command(0xd1);
        ports.send(0xdf);
        assert_eq!(ports.control.asked(), None);
        ports.command(0xd1);
        ports.send(0xde);
        assert_eq!(ports.control.asked(), reset);
    }

    #[test]
    fn linux_finds_a_keyboard_and_no_mouse_without_waiting() {
        let mut ports = Ports::new();
        // drivers/input/serio/i8042.c: nothing to flush, configuration reads the same twice.
        assert_eq!(ports.answers(), []);
        for _ in 0..2 {
            ports.command(0x20);
            assert_eq!(ports.answers(), [0x44]);
        }
        assert_ne!(ports.status() & STATUS_NOT_LOCKED, 0);
        ports.command(0x60);
        ports.send(0x74);
        ports.command(0x20);
        assert_eq!(ports.answers(), [0x74]);
        ports.command(0xaa);
        assert_eq!(ports.answers(), [0x55]);
        // The loop test of the mouse port must not say that it came from a mouse.
        ports.command(0xd3);
        ports.send(0x5a);
        assert_eq!(ports.status() & (STATUS_OUTPUT_FULL | 0x20), STATUS_OUTPUT_FULL);
        assert_eq!(ports.answers(), [0x5a]);
        ports.command(0xa9);
        assert!(![0, 0xfa, 0xff].contains(&ports.answers()[0]));
        // atkbd.c: who are you, LEDs, reset.
        ports.send(0xf2);
        assert_eq!(ports.answers(), [0xfa, 0xab, 0x83]);
        ports.send(0xed);
        ports.send(0x07);
        ports.send(0xff);
        assert_eq!(ports.answers(), [0xfa, 0xfa, 0xfa, 0xaa]);
        ports.send(0x12);
        assert_eq!(ports.answers(), [0xfe]);
    }

    #[test]
    fn bytes_interrupt_where_that_is_enabled() {
        let mut ports = Ports::new();
        let chip = ports.data.0.clone();
        let level = || lock(&chip).irq.level();
        ports.send(0xee);
        assert!(!level());
        ports.command(0x60);
        ports.send(0x45);
        assert!(level());
        assert_eq!(ports.answers(), [0xee]);
        assert!(!level());
    }

    #[test]
    fn state_is_restored_and_bad_state_refused() {
        let mut ports = Ports::new();
        ports.send(0xf2);
        ports.command(0x65);
        let saved = ports.data.save().unwrap();
        let mut other = Ports::new();
        other.data.restore(&saved).unwrap();
        other.send(9);
        other.command(0x25);
        assert_eq!(other.answers(), [0xfa, 0xab, 0x83, 9]);
        let next = saved.iter().rposition(|&byte| byte == 5).unwrap();
        let mut bad = saved.clone();
        bad[next] = 32;
        for bad in [&bad[..], &saved[..9], &[]] {
            assert!(other.data.restore(bad).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_access_breaks_it(accesses in prop::collection::vec((any::<bool>(), any::<bool>(), any::<[u8; 4]>(), 0..=4usize), 0..300)) {
            let mut ports = Ports::new();
            for (command, write, mut data, len) in accesses {
                match (command, write) {
                    (true, true) => ports.command.write(0, &data[..len]),
                    (true, false) => ports.command.read(0, &mut data[..len]),
                    (false, true) => ports.data.write(0, &data[..len]),
                    (false, false) => ports.data.read(0, &mut data[..len]),
                }
            }
            prop_assert!(ports.answers().len() <= QUEUE);
        }
    }
}
