//! Virtio devices: balloon, console, and those that the program writes.

use std::ffi::{c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use vmcore::{Error, EventSet, GuestMemory};
use vmdevices::virtio::{
    Activation, BalloonHandle, Chain, DeviceType, Progress, QueueError, Source, VirtQueue, VirtioDevice,
    Worker,
};
use vmdevices::{Balloon, VirtioConsole};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bytes::{bytes, bytes_mut, text};
use crate::callback::{Table, User, required, table, vmcore_drop_fn};
use crate::console::vmcore_console;
use crate::disk::attached;
use crate::error::{Result, give, guard, need, put, vmcore_error};

/// A balloon: to be attached to a machine, and a handle on it from then on.
pub struct vmcore_balloon {
    balloon: Option<Balloon>,
    handle: BalloonHandle,
}

impl vmcore_balloon {
    pub(crate) fn take(&mut self) -> Result<Balloon> {
        self.balloon.take().ok_or_else(|| attached("balloon"))
    }
}

/// A balloon of nothing, with free-page reporting.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_balloon_new(
    out: Option<&mut MaybeUninit<*mut vmcore_balloon>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let balloon = Balloon::new()?;
        give(out, vmcore_balloon { handle: balloon.handle(), balloon: Some(balloon) })
    })
}

/// Wishes `bytes` of the guest's memory in the balloon; the guest follows as it can.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_balloon_set_target(
    balloon: Option<&vmcore_balloon>,
    bytes: u64,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let set = need(balloon, "balloon")?.handle.set_target(bytes);
        Ok(set.map_err(|error| Error::Config {
            what: "target of the balloon",
            value: bytes.to_string(),
            fix: error.to_string(),
        })?)
    })
}

/// Bytes that the guest says are in the balloon.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_balloon_actual(balloon: Option<&vmcore_balloon>) -> u64 {
    balloon.map_or(0, |balloon| balloon.handle.actual())
}

/// Frees the handle, and the balloon where no machine has it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_balloon_delete(balloon: Option<Box<vmcore_balloon>>) {
    drop(balloon);
}

/// A virtio console with ports, to be attached to a machine.
pub struct vmcore_virtio_console {
    pub(crate) console: VirtioConsole,
}

/// A console whose terminal is `console`, which is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_virtio_console_new(
    console: Option<Box<vmcore_console>>,
    out: Option<&mut MaybeUninit<*mut vmcore_virtio_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let console = VirtioConsole::new(need(console, "console")?.console);
        give(out, vmcore_virtio_console { console })
    })
}

/// Adds a port called `name` for programs of the guest. `console` is taken. The object is not to be used where this
/// fails, but deleted.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_virtio_console_add_port(
    to: Option<&mut vmcore_virtio_console>,
    name: *const c_char,
    console: Option<Box<vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (to, name, port) = (need(to, "to")?, text!(name), need(console, "console")?.console);
        let before = std::mem::replace(&mut to.console, VirtioConsole::new(vmdevices::console::Null));
        to.console = before.port(name, port)?;
        Ok(())
    })
}

/// Frees it, where no machine has taken it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_virtio_console_delete(console: Option<Box<vmcore_virtio_console>>) {
    drop(console);
}

/// What becomes of a request.
pub type vmcore_served = u32;
/// It is done, and goes back to the driver with what was written.
pub const VMCORE_SERVED_DONE: vmcore_served = 0;
/// It waits at the head of its queue until vmcore_virtio_wake; a notification of the driver's may come before. Nothing may
/// have been read of it or written to it.
pub const VMCORE_SERVED_LATER: vmcore_served = 1;

/// What a virtio device of the program's does. `read_config` and `write_config` are called on the threads of vCPUs, `serve`
/// on an I/O thread and at the same time, one call at a time of each.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_virtio_ops {
    /// sizeof(vmcore_virtio_ops).
    pub size: usize,
    /// Serves one request of queue number `queue`; `chain` lives for the call.
    pub serve: Option<
        unsafe extern "C" fn(user: *mut c_void, queue: u16, chain: *mut vmcore_chain) -> vmcore_served,
    >,
    /// Reads the configuration; what is beyond its end is to be left as it is. NULL for a device without.
    pub read_config: Option<unsafe extern "C" fn(user: *mut c_void, offset: u64, data: *mut u8, len: usize)>,
    /// Takes a write to the configuration; the guest chooses offset and length. May be NULL.
    pub write_config:
        Option<unsafe extern "C" fn(user: *mut c_void, offset: u64, data: *const u8, len: usize)>,
    /// The driver is ready, with these features. May be NULL.
    pub activate: Option<unsafe extern "C" fn(user: *mut c_void, features: u64) -> Option<Box<vmcore_error>>>,
    /// The device has been deleted; may be NULL.
    pub drop: vmcore_drop_fn,
}

// SAFETY: a number and functions that may be NULL.
unsafe impl Table for vmcore_virtio_ops {}

type Serve = unsafe extern "C" fn(*mut c_void, u16, *mut vmcore_chain) -> vmcore_served;

/// A virtio device of the program's: to be attached to a machine, and a handle on it from then on.
pub struct vmcore_virtio {
    device: Option<Device>,
    wake: Arc<EventFd>,
}

impl vmcore_virtio {
    pub(crate) fn take(&mut self) -> Result<impl VirtioDevice + use<>> {
        self.device.take().ok_or_else(|| attached("device"))
    }
}

/// One request of a driver, for the call of `serve`.
pub struct vmcore_chain {
    /// Its lifetime is that call's.
    chain: NonNull<Chain<'static>>,
    written: u32,
}

struct Device {
    kind: u32,
    features: u64,
    sizes: Vec<u16>,
    serve: Serve,
    ops: vmcore_virtio_ops,
    user: Arc<User>,
    wake: Arc<EventFd>,
}

impl VirtioDevice for Device {
    fn device_type(&self) -> DeviceType {
        DeviceType(self.kind)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.sizes.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if let Some(read) = self.ops.read_config {
            // SAFETY: the program's function with its pointer, and as many bytes as it is told.
            unsafe { read(self.user.get(), offset, data.as_mut_ptr(), data.len()) }
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some(write) = self.ops.write_config {
            // SAFETY: the program's function with its pointer, and as many bytes as it is told.
            unsafe { write(self.user.get(), offset, data.as_ptr(), data.len()) }
        }
    }

    fn activate(&mut self, activation: Activation) -> vmcore::Result<Vec<Box<dyn Worker>>> {
        if let Some(activate) = self.ops.activate {
            // SAFETY: the program's function with its pointer.
            if let Some(error) = unsafe { activate(self.user.get(), activation.features) } {
                return Err(error.into_device_error("of the program"));
            }
        }
        let Activation { memory, queues, .. } = activation;
        let (serve, user, wake) = (self.serve, self.user.clone(), self.wake.clone());
        Ok(vec![Box::new(DeviceWorker { memory, queues, serve, user, wake })])
    }
}

struct DeviceWorker {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    serve: Serve,
    user: Arc<User>,
    wake: Arc<EventFd>,
}

/// Requests served before others have a turn.
const TURN: usize = 64;

impl Worker for DeviceWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, queue: u16) -> std::result::Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(ring) = self.queues.get_mut(usize::from(queue)) else { return Ok(Progress::Idle) };
        ring.disable_notifications(&map)?;
        for _ in 0..TURN {
            let Some(mut chain) = ring.pop(&map)? else {
                ring.signal(&map)?;
                if !ring.enable_notifications(&map)? {
                    return Ok(Progress::Idle);
                }
                // A request came before the driver was asked to tell of one.
                ring.disable_notifications(&map)?;
                continue;
            };
            let head = chain.head;
            let mut request = vmcore_chain { chain: NonNull::from(&mut chain).cast(), written: 0 };
            // SAFETY: the program's function with its pointer, and a request that lives for the call.
            let served = unsafe { (self.serve)(self.user.get(), queue, &raw mut request) };
            match served {
                VMCORE_SERVED_LATER => {
                    ring.unpop(1);
                    ring.signal(&map)?;
                    // There is one, and it waits: whatever this says is not news.
                    ring.enable_notifications(&map)?;
                    return Ok(Progress::Idle);
                }
                VMCORE_SERVED_DONE => ring.push(&map, head, request.written)?,
                _ => {
                    return Err(QueueError::Request {
                        queue,
                        what: "the program served it with no VMCORE_SERVED_*",
                    });
                }
            }
        }
        ring.signal(&map)?;
        Ok(Progress::More)
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.wake.clone(), events: EventSet::IN }]
    }

    fn ready(&mut self, _: usize) -> std::result::Result<Progress, QueueError> {
        // Where it was taken already there is nothing to be had.
        self.wake.read().ok();
        let mut progress = Progress::Idle;
        for queue in 0..u16::try_from(self.queues.len()).unwrap_or(u16::MAX) {
            if self.notify(queue)? == Progress::More {
                progress = Progress::More;
                self.wake.write(1).ok();
            }
        }
        Ok(progress)
    }
}

/// A device of virtio type `kind` that offers `features` and has queues of these sizes, powers of two up to 32768. `ops`
/// is copied. `user` is taken, where the call does not fail.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_virtio_new(
    kind: u32,
    features: u64,
    queue_sizes: *const u16,
    queues: usize,
    ops: *const vmcore_virtio_ops,
    user: *mut c_void,
    out: Option<&mut MaybeUninit<*mut vmcore_virtio>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let out = need(out, "out")?;
        // SAFETY: the caller gives NULL or a table that begins with its size.
        let ops = unsafe { table(ops) }?;
        let serve = required(ops.serve, "ops.serve")?;
        if queue_sizes.is_null() || !(1..=64).contains(&queues) {
            return Err(vmcore_error::argument("queues", queues, "give 1 to 64, with their sizes"));
        }
        // SAFETY: the caller gives that many sizes.
        let sizes = unsafe { std::slice::from_raw_parts(queue_sizes, queues) }.to_vec();
        if let Some(size) = sizes.iter().find(|size| !size.is_power_of_two() || **size > 32768) {
            return Err(vmcore_error::argument("queue_sizes", size, "give powers of two up to 32768"));
        }
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map(Arc::new)
            .map_err(|error| Error::os("eventfd", "a virtio device", error))?;
        let user = Arc::new(User::new(user, ops.drop));
        let device = Device { kind, features, sizes, serve, ops, user, wake: wake.clone() };
        give(Some(out), vmcore_virtio { device: Some(device), wake })
    })
}

/// Has `serve` called for the requests that wait. From any thread.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_virtio_wake(device: Option<&vmcore_virtio>) {
    if let Some(device) = device {
        // Full means that it rings already.
        device.wake.write(1).ok();
    }
}

/// Frees the handle, and the device where no machine has it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_virtio_delete(device: Option<Box<vmcore_virtio>>) {
    drop(device);
}

fn chain(request: Option<&mut vmcore_chain>) -> Result<(&mut Chain<'static>, &mut u32)> {
    let request = need(request, "chain")?;
    // SAFETY: the chain lives during `serve`, on whose thread alone this is used.
    Ok((unsafe { request.chain.as_mut() }, &mut request.written))
}

/// How many bytes of the driver's are still to be read.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_chain_readable(request: Option<&mut vmcore_chain>) -> usize {
    chain(request).map_or(0, |(chain, _)| chain.readable.len())
}

/// How many bytes can still be written for the driver.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_chain_writable(request: Option<&mut vmcore_chain>) -> usize {
    chain(request).map_or(0, |(chain, _)| chain.writable.len())
}

/// Takes up to `len` of the driver's bytes, and tells how many there were.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_chain_read(
    request: Option<&mut vmcore_chain>,
    data: *mut u8,
    len: usize,
    out: Option<&mut MaybeUninit<usize>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (out, (chain, _)) = (need(out, "out")?, chain(request)?);
        put(Some(out), chain.readable.read(bytes_mut!(data, len)))
    })
}

/// Writes up to `len` bytes for the driver, and tells how many had room.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_chain_write(
    request: Option<&mut vmcore_chain>,
    data: *const u8,
    len: usize,
    out: Option<&mut MaybeUninit<usize>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (out, (chain, written)) = (need(out, "out")?, chain(request)?);
        let count = chain.writable.write(bytes!(data, len));
        *written = written.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        put(Some(out), count)
    })
}
