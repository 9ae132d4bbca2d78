//! Sixteen-bit code on a bare vCPU: no kernel, no device, the guest's I/O goes to a closure.

use vmcore::{Accel, GuestAddress, Io, MemoryRegion, VcpuExit, Vm};

/// mov dx, 0x3f8; mov si, text; next: lodsb; test al, al; jz done; out dx, al; jmp next; done: hlt; text:
const CODE: &[u8] = b"\xba\xf8\x03\xbe\x10\x00\xac\x84\xc0\x74\x03\xee\xeb\xf8\xf4\x90Hello from a vCPU!\n\0";

fn main() -> vmcore::Result<()> {
    let vm = Vm::bare(Accel::Auto)?;
    vm.map(MemoryRegion::anonymous(GuestAddress(0), 0x10000)?)?;
    vm.memory().write(GuestAddress(0x1000), CODE)?;

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.enter_real_mode(GuestAddress(0x1000))?;
    let exit = vcpu.run_with(|io| {
        if let Io::PortWrite { port: 0x3f8, data } = io {
            print!("{}", char::from(data[0]));
        }
    })?;
    assert_eq!(exit, VcpuExit::Halted);
    Ok(())
}
