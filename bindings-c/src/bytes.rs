//! Texts and bytes in both directions.

use std::ffi::{CStr, CString, c_char};

use crate::error::{Result, vmcore_error};

/// Bytes that the library made: a transcript, a state, a bitmap. They are followed by a zero byte, which does
/// not count, so that a text can be printed.
#[derive(Debug)]
pub struct vmcore_bytes {
    bytes: Vec<u8>,
}

impl vmcore_bytes {
    pub(crate) fn new(bytes: impl Into<Vec<u8>>) -> Self {
        let mut bytes = bytes.into();
        bytes.push(0);
        Self { bytes }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes.split_last().map_or(&[], |(_, bytes)| bytes)
    }
}

/// Copies `len` bytes from `data`, for callbacks to return.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmcore_bytes_new(data: *const u8, len: usize) -> Option<Box<vmcore_bytes>> {
    // SAFETY: the caller gives `len` bytes.
    let data = unsafe { slice(data, len, "data") }.ok()?;
    Some(Box::new(vmcore_bytes::new(data)))
}

/// The first byte. It lives as long as the object.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_bytes_data(bytes: Option<&vmcore_bytes>) -> *const u8 {
    bytes.map_or(c"".as_ptr().cast(), |bytes| bytes.bytes.as_ptr())
}

/// The same as text.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_bytes_text(bytes: Option<&vmcore_bytes>) -> *const c_char {
    vmcore_bytes_data(bytes).cast()
}

/// How many there are.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_bytes_len(bytes: Option<&vmcore_bytes>) -> usize {
    bytes.map_or(0, |bytes| bytes.as_slice().len())
}

/// Frees them.
#[unsafe(no_mangle)]
pub extern "C" fn vmcore_bytes_delete(bytes: Option<Box<vmcore_bytes>>) {
    drop(bytes);
}

/// The text at `text`; errors say that it is `what`.
///
/// # Safety
/// `text` is NULL or ends with a zero byte, and stays for `'a`.
pub(crate) unsafe fn text_at<'a>(text: *const c_char, what: &str) -> Result<&'a str> {
    if text.is_null() {
        return Err(vmcore_error::argument(what, "NULL", "give it a text"));
    }
    // SAFETY: as the caller promises.
    let bytes = unsafe { CStr::from_ptr(text) };
    bytes.to_str().map_err(|_| vmcore_error::argument(what, format!("{bytes:?}"), "write it in UTF-8"))
}

/// The text at `text` whatever its bytes are, or `None` for NULL.
///
/// # Safety
/// As [`text_at`].
pub(crate) unsafe fn lossy(text: *const c_char) -> Option<String> {
    // SAFETY: as the caller promises.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// `len` bytes at `data`.
///
/// # Safety
/// They are there for `'a`, and nobody writes them meanwhile; `data` may be NULL.
pub(crate) unsafe fn slice<'a>(data: *const u8, len: usize, what: &str) -> Result<&'a [u8]> {
    check(data, len, what)?;
    // SAFETY: as the caller promises; not NULL, and no longer than a slice can be.
    Ok(if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data, len) } })
}

/// `len` bytes at `data`, to be written.
///
/// # Safety
/// They are there for `'a`, and nobody else uses them meanwhile; `data` may be NULL.
pub(crate) unsafe fn slice_mut<'a>(data: *mut u8, len: usize, what: &str) -> Result<&'a mut [u8]> {
    check(data, len, what)?;
    // SAFETY: as the caller promises; not NULL, and no longer than a slice can be.
    Ok(if len == 0 { &mut [] } else { unsafe { std::slice::from_raw_parts_mut(data, len) } })
}

fn check(data: *const u8, len: usize, what: &str) -> Result<()> {
    if len > 0 && data.is_null() {
        return Err(vmcore_error::argument(what, "NULL", "give it as many bytes as the length says"));
    }
    if isize::try_from(len).is_err() {
        return Err(vmcore_error::argument("len", format!("{len:#x}"), "no object is that long"));
    }
    Ok(())
}

/// Copies `text` into the `len` bytes at `buffer` as snprintf does, and returns its length.
///
/// # Safety
/// As [`slice_mut`].
pub(crate) unsafe fn format_into(buffer: *mut c_char, len: usize, text: &str) -> usize {
    let text = CString::new(text).unwrap_or_default();
    // SAFETY: as the caller promises.
    if let Ok([into @ .., last]) = unsafe { slice_mut(buffer.cast(), len, "buffer") } {
        let count = into.len().min(text.as_bytes().len());
        into[..count].copy_from_slice(&text.as_bytes()[..count]);
        match into.get_mut(count) {
            Some(end) => *end = 0,
            None => *last = 0,
        }
    }
    text.as_bytes().len()
}

/// Reads an argument that is a text, or returns with an error.
macro_rules! text {
    ($argument:ident) => {
        // SAFETY: the caller gives NULL or a text that ends with a zero byte and stays for the call.
        unsafe { crate::bytes::text_at($argument, stringify!($argument)) }?
    };
}

/// Reads an argument of bytes, or returns with an error.
macro_rules! bytes {
    ($data:ident, $len:ident) => {
        // SAFETY: the caller gives that many bytes, which stay for the call.
        unsafe { crate::bytes::slice($data, $len, stringify!($data)) }?
    };
}

/// The place for bytes that an argument is, or returns with an error.
macro_rules! bytes_mut {
    ($data:ident, $len:ident) => {
        // SAFETY: the caller gives room for that many bytes, which nobody else uses during the call.
        unsafe { crate::bytes::slice_mut($data, $len, stringify!($data)) }?
    };
}

pub(crate) use {bytes, bytes_mut, text};
