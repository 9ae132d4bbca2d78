//! What a character device is connected to on the host.

use std::ffi::{c_char, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use vmdevices::console::{self, Callback, Console, Descriptor, File, Input, Null, Pty, Socket, Stdio};

use crate::bytes::{text, vmcore_bytes};
use crate::callback::{Table, User, required, table, vmcore_drop_fn};
use crate::error::{give, guard, need, vmcore_error};
use crate::region::duplicate;
use crate::script::vmcore_script;

/// The host's side of a character device, to be given to a machine.
pub struct vmcore_console {
    pub(crate) console: Box<dyn Console>,
}

/// Gets what the guest writes, on a vCPU's thread, which waits for it.
pub type vmcore_output_fn = Option<unsafe extern "C" fn(user: *mut c_void, data: *const u8, len: usize)>;

/// A console that the program writes. Functions are called one at a time, on any thread, and must not block.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct vmcore_console_ops {
    /// sizeof(vmcore_console_ops).
    pub size: usize,
    /// Takes output, as much from the front as can be taken now: how many bytes, or a negative errno.
    pub write: Option<unsafe extern "C" fn(user: *mut c_void, data: *const u8, len: usize) -> isize>,
    /// Gives input: how many bytes, 0 where there will be no more, -EAGAIN where there is none now, or another
    /// negative errno. NULL for a console without input.
    pub read: Option<unsafe extern "C" fn(user: *mut c_void, data: *mut u8, len: usize) -> isize>,
    /// The console has been deleted; may be NULL.
    pub drop: vmcore_drop_fn,
}

// SAFETY: a number and functions that may be NULL.
unsafe impl Table for vmcore_console_ops {}

type Write = unsafe extern "C" fn(*mut c_void, *const u8, usize) -> isize;

struct Custom {
    write: Write,
    ops: vmcore_console_ops,
    input: Option<Descriptor>,
    user: User,
}

/// What a function of the program answered.
fn answer(count: isize, most: usize) -> io::Result<usize> {
    match usize::try_from(count) {
        Ok(count) => Ok(count.min(most)),
        Err(_) => {
            let number = i32::try_from(count.unsigned_abs()).unwrap_or(libc::EIO);
            Err(io::Error::from_raw_os_error(number))
        }
    }
}

impl Console for Custom {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the program's function with its pointer, and as many bytes as it is told.
        answer(unsafe { (self.write)(self.user.get(), bytes.as_ptr(), bytes.len()) }, bytes.len())
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<Input> {
        let Some(read) = self.ops.read else { return Ok(Input::End) };
        // SAFETY: the program's function with its pointer, and as many bytes as it is told.
        let count = unsafe { read(self.user.get(), buffer.as_mut_ptr(), buffer.len()) };
        Ok(match answer(count, buffer.len())? {
            0 => Input::End,
            count => Input::Bytes(count),
        })
    }

    fn input(&self) -> Option<Descriptor> {
        self.input.clone()
    }
}

fn boxed(console: impl Console + 'static) -> vmcore_console {
    vmcore_console { console: Box::new(console) }
}

/// Standard input and output; on a terminal, Ctrl-A x stops the VM.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_console_stdio(
    out: Option<&mut MaybeUninit<*mut vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, boxed(Stdio::new()?)))
}

/// Nowhere.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_console_null(
    out: Option<&mut MaybeUninit<*mut vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, boxed(Null)))
}

/// Output goes to a function; there is no input. `user` is taken.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_console_callback(
    output: vmcore_output_fn,
    user: *mut c_void,
    drop: vmcore_drop_fn,
    out: Option<&mut MaybeUninit<*mut vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    let user = User::new(user, drop);
    guard(|| {
        let output = required(output, "output")?;
        let take = move |bytes: &[u8]| {
            // SAFETY: the program's function with its pointer, and as many bytes as it is told.
            unsafe { output(user.get(), bytes.as_ptr(), bytes.len()) }
        };
        give(out, boxed(Callback::new(take)))
    })
}

/// A console of the functions in `ops`, which is copied. `input_fd` becomes readable when there is input again after
/// -EAGAIN, or is -1; it is duplicated, and stays the caller's. `user` is taken, where the call does not fail.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_console_custom(
    ops: *const vmcore_console_ops,
    user: *mut c_void,
    input_fd: i32,
    out: Option<&mut MaybeUninit<*mut vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let out = need(out, "out")?;
        // SAFETY: the caller gives NULL or a table that begins with its size.
        let ops = unsafe { table(ops) }?;
        let write = required(ops.write, "ops.write")?;
        let input = if input_fd == -1 { None } else { Some(Arc::new(duplicate(input_fd)?)) };
        give(Some(out), boxed(Custom { write, ops, input, user: User::new(user, ops.drop) }))
    })
}

/// Output goes to the file at `path`, which is made or emptied, or where `append` is set appended to.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_console_file(
    path: *const c_char,
    append: bool,
    out: Option<&mut MaybeUninit<*mut vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let path = text!(path);
        give(out, boxed(if append { File::append(path)? } else { File::create(path)? }))
    })
}

/// A new pseudo-terminal; `path` gets the name of its other end.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_console_pty(
    path: Option<&mut MaybeUninit<*mut vmcore_bytes>>,
    out: Option<&mut MaybeUninit<*mut vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (path, out) = (need(path, "path")?, need(out, "out")?);
        let pty = Pty::new()?;
        give(Some(path), vmcore_bytes::new(pty.path().as_os_str().as_bytes()))?;
        give(Some(out), boxed(pty))
    })
}

/// Who connects to a Unix socket at `path`.
#[unsafe(no_mangle)]
#[must_use]
pub unsafe extern "C" fn vmcore_console_socket(
    path: *const c_char,
    out: Option<&mut MaybeUninit<*mut vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| give(out, boxed(Socket::listen(text!(path))?)))
}

/// A script, which waits for output and types.
#[unsafe(no_mangle)]
#[must_use]
pub extern "C" fn vmcore_console_script(
    script: Option<&mut MaybeUninit<*mut vmcore_script>>,
    out: Option<&mut MaybeUninit<*mut vmcore_console>>,
) -> Option<Box<vmcore_error>> {
    guard(|| {
        let (place, out) = (need(script, "script")?, need(out, "out")?);
        let (memory, script) = console::memory()?;
        give(Some(place), vmcore_script { script })?;
        give(Some(out), boxed(memory))
    })
}

/// Frees it, where no machine has taken it.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_console_delete(console: Option<Box<vmcore_console>>) {
    drop(console);
}
