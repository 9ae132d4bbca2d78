//! The system calls behind the backend that kvm-ioctls has no safe wrapper for.
#![expect(unsafe_code, reason = "raw ioctls, the shared kvm_run page and thread signal masks")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_run, kvm_run__bindgen_ty_1__bindgen_ty_4 as IoExit,
    kvm_run__bindgen_ty_1__bindgen_ty_6 as MmioExit, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr};

/// `struct kvm_signal_mask` with its flexible array filled in: the kernel's signal set has 8 bytes.
#[repr(C)]
struct SignalMask {
    len: u32,
    sigset: [u8; 8],
}

ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
// The number is made from the size of the structure without its flexible array, a u32.
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);

/// The result of a call that returns 0 or -1 and `errno`.
fn done(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// One mapping of a vCPU's `kvm_run`, which the kernel reads and writes during KVM_RUN.
#[derive(Debug)]
struct Mapping {
    run: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping is plain memory that belongs to no thread. What may be done with it from
// where is up to `RunPage` (one owner) and `ImmediateExit` (one atomic byte).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `run` and `len` are what mmap returned and was given, and the owners are gone.
        unsafe { libc::munmap(self.run.as_ptr().cast(), self.len) };
    }
}

/// The vCPU's own access to its `kvm_run`: what the last exit was about.
#[derive(Debug)]
pub(super) struct RunPage(Arc<Mapping>);

/// The `immediate_exit` byte of a `kvm_run`: non-zero makes KVM_RUN return at once with EINTR, after
/// it has finished the I/O that was pending.
#[derive(Debug)]
pub(super) struct ImmediateExit(Arc<Mapping>);

impl RunPage {
    /// Maps `len` bytes (KVM_GET_VCPU_MMAP_SIZE) of `vcpu`.
    pub(super) fn map(vcpu: &VcpuFd, len: usize) -> io::Result<(Self, ImmediateExit)> {
        if len < size_of::<kvm_run>() {
            return Err(io::Error::other(format!("the kernel's kvm_run has only {len} bytes")));
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, vcpu.as_raw_fd(), 0) };
        match NonNull::new(address) {
            Some(run) if address != libc::MAP_FAILED => {
                let mapping = Arc::new(Mapping { run: run.cast(), len });
                Ok((Self(mapping.clone()), ImmediateExit(mapping)))
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// KVM_EXIT_*: why KVM_RUN returned.
    #[inline]
    pub(super) fn exit_reason(&self) -> u32 {
        // SAFETY: `run` points to a live kvm_run; the pointer is used for one field only.
        let field = unsafe { &raw const (*self.0.run.as_ptr()).exit_reason };
        // SAFETY: the field is initialised (the kernel zeroes the page) and aligned, and the kernel
        // writes it only within KVM_RUN, which the caller has returned from.
        unsafe { field.read_volatile() }
    }

    /// A copy of the exit information, seen as `T`, one of the plain-data members of the union.
    pub(super) fn exit<T: zeroable::PlainExit>(&self) -> T {
        // SAFETY: `run` points to a live kvm_run; only the address of the union is taken.
        let union = unsafe { &raw const (*self.0.run.as_ptr()).__bindgen_anon_1 };
        // SAFETY: `PlainExit` types are members of this union made of integers only, so that any
        // bytes are valid, and the kernel writes them only within KVM_RUN.
        unsafe { union.cast::<T>().read_volatile() }
    }

    /// The operands of a KVM_EXIT_IO: `None` where the kernel describes bytes outside of the page.
    #[inline]
    pub(super) fn io_data(&mut self, exit: &IoExit) -> Option<&mut [u8]> {
        let offset = usize::try_from(exit.data_offset).ok()?;
        let len = usize::from(exit.size).checked_mul(exit.count as usize)?;
        if offset.checked_add(len)? > self.0.len || offset < size_of::<kvm_run>() {
            return None;
        }
        // SAFETY: the offset is within the mapping, as just checked.
        let first = unsafe { self.0.run.as_ptr().cast::<u8>().add(offset) };
        // SAFETY: the bytes are within the mapping and behind the kvm_run structure, where no other
        // reference of ours leads; `&mut self` keeps KVM_RUN from being called meanwhile.
        Some(unsafe { std::slice::from_raw_parts_mut(first, len) })
    }

    /// The data bytes of a KVM_EXIT_MMIO.
    #[inline]
    pub(super) fn mmio_data(&mut self) -> &mut [u8; 8] {
        // SAFETY: `run` points to a live kvm_run; only the address of the union is taken.
        let union = unsafe { &raw mut (*self.0.run.as_ptr()).__bindgen_anon_1 };
        // SAFETY: only the address of the field is taken.
        let data = unsafe { &raw mut (*union.cast::<MmioExit>()).data };
        // SAFETY: eight bytes within the mapping; the only other access to the page that may happen
        // meanwhile is to `immediate_exit`, another byte.
        unsafe { &mut *data }
    }
}

impl ImmediateExit {
    /// The byte.
    #[inline]
    pub(super) fn byte(&self) -> &AtomicU8 {
        // SAFETY: `run` points to a live kvm_run; only the address of the field is taken.
        let field = unsafe { &raw mut (*self.0.run.as_ptr()).immediate_exit };
        // SAFETY: the byte lives as long as `self`, and everybody on our side reaches it through
        // this function; the kernel only reads it.
        unsafe { AtomicU8::from_ptr(field) }
    }
}

mod zeroable {
    use kvm_bindings as k;

    /// A member of `kvm_run`'s union that is made of integers.
    ///
    /// # Safety
    /// Any bytes must be a valid value, and it must not be larger than the union.
    pub(in super::super) unsafe trait PlainExit: Copy {}

    macro_rules! plain {
        ($($type:ident),*) => { $(
            // SAFETY: a member of the union, made of integers and arrays of them.
            unsafe impl PlainExit for k::$type {}
        )* };
    }
    plain!(
        kvm_run__bindgen_ty_1__bindgen_ty_1,
        kvm_run__bindgen_ty_1__bindgen_ty_2,
        kvm_run__bindgen_ty_1__bindgen_ty_4,
        kvm_run__bindgen_ty_1__bindgen_ty_5,
        kvm_run__bindgen_ty_1__bindgen_ty_6,
        kvm_run__bindgen_ty_1__bindgen_ty_13,
        kvm_run__bindgen_ty_1__bindgen_ty_27
    );
}

/// KVM_RUN: 0, or the `errno`.
#[inline]
pub(super) fn run(vcpu: &VcpuFd) -> i32 {
    // SAFETY: KVM_RUN takes no argument. It lets the guest write the memory mapped into the VM,
    // which is shared memory to us, and the kernel write the kvm_run page, to which no reference of
    // ours exists here (`RunPage` hands them out by `&mut self`).
    match unsafe { ioctl(vcpu, KVM_RUN()) } {
        0 => 0,
        _ => io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
    }
}

/// Sets the signals blocked within KVM_RUN (bit `n - 1` for signal `n`).
pub(super) fn set_signal_mask(vcpu: &VcpuFd, mask: u64) -> io::Result<()> {
    let argument = SignalMask { len: 8, sigset: mask.to_ne_bytes() };
    // SAFETY: the kernel reads `len` and that many bytes behind it, which are there.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &argument) })
}

/// Adds or removes a doorbell.
pub(super) fn ioeventfd(vm: &VmFd, argument: &kvm_ioeventfd) -> io::Result<()> {
    // SAFETY: the kernel reads the structure, and checks the descriptor in it itself.
    done(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), argument) })
}

/// Sets one memory slot.
///
/// # Safety
/// The host memory named must stay mapped until the slot is set to size 0 or the VM is gone.
pub(super) unsafe fn set_user_memory_region(
    vm: &VmFd,
    region: kvm_userspace_memory_region,
) -> io::Result<()> {
    // SAFETY: the caller keeps the memory mapped.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}

/// A descriptor of the binary statistics of a VM or vCPU.
pub(super) fn stats_fd(fd: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no argument and touches no memory of ours.
    let stats: RawFd = unsafe { ioctl(fd, KVM_GET_STATS_FD()) };
    if stats < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(stats) })
}

/// The XSAVE area of a vCPU into `area`, whose length is the size that KVM_CAP_XSAVE2 tells.
pub(super) fn get_xsave(vcpu: &VcpuFd, size: XsaveSize) -> io::Result<Vec<u8>> {
    let mut area = size.area();
    // SAFETY: the area is at least as large as the kernel says that it writes (`XsaveSize`), and
    // the cast is only for the ioctl's number: its address is all that is passed.
    let result = if size.extended {
        // SAFETY: as above.
        let first = unsafe { &mut *area.as_mut_ptr().cast::<kvm_xsave>() };
        // SAFETY: as above.
        unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_XSAVE2(), first) }
    } else {
        match vcpu.get_xsave() {
            Ok(xsave) => {
                area[..xsave.region.len()].copy_from_slice(&xsave.region);
                0
            }
            Err(e) => return Err(e.into()),
        }
    };
    done(result)?;
    Ok(area.iter().flat_map(|word| word.to_le_bytes()).collect())
}

/// Sets the XSAVE area of a vCPU from `bytes`; missing bytes are zero, bytes beyond the size dropped.
pub(super) fn set_xsave(vcpu: &VcpuFd, size: XsaveSize, bytes: &[u8]) -> io::Result<()> {
    let mut area = size.area();
    for (word, bytes) in area.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    // SAFETY: the area is aligned like kvm_xsave (u32) and at least as large.
    let first = unsafe { &*area.as_ptr().cast::<kvm_xsave>() };
    // SAFETY: the kernel reads at most as many bytes as KVM_CAP_XSAVE2 tells, which the area has.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_XSAVE(), first) })
}

/// How large a vCPU's XSAVE area is.
#[derive(Clone, Copy, Debug)]
pub(super) struct XsaveSize {
    /// KVM_GET_XSAVE2 is there.
    extended: bool,
    /// Bytes, at least 4096.
    bytes: usize,
}

impl XsaveSize {
    /// From what KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) says; 0 where it is not there.
    pub(super) fn from_capability(value: i32) -> Self {
        let bytes = usize::try_from(value).unwrap_or(0);
        Self { extended: bytes >= 4096, bytes: bytes.max(4096) }
    }

    /// The size in bytes.
    pub(super) fn bytes(self) -> usize {
        self.bytes
    }

    fn area(self) -> Vec<u32> {
        vec![0; self.bytes.max(size_of::<kvm_xsave>()).div_ceil(4)]
    }
}

/// Id of the calling thread.
pub(super) fn thread_id() -> libc::pid_t {
    // Not by libc's gettid: the standard library refers to that weakly, and where link-time
    // optimization makes one of both references, a static libc leaves it out.
    // SAFETY: the call takes nothing and cannot fail.
    let id = unsafe { libc::syscall(libc::SYS_gettid) };
    #[expect(clippy::cast_possible_truncation, reason = "the kernel's pid_t in a register")]
    {
        id as libc::pid_t
    }
}

/// Sends `signal` to thread `tid` of this process.
pub(super) fn signal_thread(tid: libc::pid_t, signal: i32) {
    // SAFETY: the call takes no pointer.
    let pid = unsafe { libc::getpid() };
    // SAFETY: as above. Which thread gets the signal is the caller's to know.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
}

/// The bit of `signal` in a kernel signal set.
pub(super) fn signal_bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Blocks the signals of `mask` in the calling thread; returns the mask there was.
pub(super) fn block_signals(mask: u64) -> io::Result<u64> {
    change_mask(libc::SIG_BLOCK, mask)
}

/// Sets the signal mask of the calling thread to what [`block_signals`] returned.
pub(super) fn restore_signals(mask: u64) -> io::Result<u64> {
    change_mask(libc::SIG_SETMASK, mask)
}

fn change_mask(how: i32, mask: u64) -> io::Result<u64> {
    let mut old = 0u64;
    // SAFETY: both sets have the 8 bytes announced and live through the call.
    let result = unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const mask, &raw mut old, size_of::<u64>())
    };
    if result == 0 { Ok(old) } else { Err(io::Error::last_os_error()) }
}

/// Takes the pending signals of `mask`, which the calling thread blocks, without waiting.
pub(super) fn drain_signals(mask: u64) {
    let none = std::ptr::null_mut::<libc::siginfo_t>();
    let timeout = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        // SAFETY: the set has the 8 bytes announced, the information is not asked for, and the
        // timeout is valid; all live through the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigtimedwait,
                &raw const mask,
                none,
                &raw const timeout,
                size_of::<u64>(),
            )
        };
        let interrupted = result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINTR);
        if result <= 0 && !interrupted {
            return;
        }
    }
}
