//! A device of one's own: a port that adds up what the guest writes, on a machine without any other.

use std::sync::{Arc, Mutex};

use vmcore::boot::{Raw, RawMode};
use vmcore::{BusDevice, Control, Machine, Outcome, Vm};

/// Write: adds the byte. Read: the sum. Writing 0 ends the VM with the sum as its exit code.
struct Adder {
    sum: u32,
    control: Control,
}

impl BusDevice for Adder {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        let sum = self.sum.to_le_bytes();
        let len = data.len().min(sum.len());
        data[..len].copy_from_slice(&sum[..len]);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        match data[0] {
            0 => self.control.end(Outcome::Exit(self.sum)),
            byte => self.sum = self.sum.wrapping_add(byte.into()),
        }
    }
}

/// mov al, 10; next: out 0x42, al; dec al; jnz next; out 0x42, al; hlt
const CODE: &[u8] = &[0xb0, 10, 0xe6, 0x42, 0xfe, 0xc8, 0x75, 0xfa, 0xe6, 0x42, 0xf4];

fn main() -> vmcore::Result<()> {
    let mut vm = Vm::builder()
        .memory(64 << 10)
        .irqchip(false)
        .boot(Raw::new(CODE, RawMode::Real16))
        .attach(|machine: &mut Machine| {
            let control = machine.control();
            machine.ports(0x42, 1, Arc::new(Mutex::new(Adder { sum: 0, control })))
        })
        .build()?;
    match vm.run()? {
        Outcome::Exit(sum) => println!("10 + 9 + ... + 1 = {sum}"),
        other => println!("the guest ended in another way: {other:?}"),
    }
    Ok(())
}
