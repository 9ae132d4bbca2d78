//! The guest's memory: by address, by slice, by `struct` format, and as a buffer.
#![expect(unsafe_code, reason = "the buffer protocol gives out addresses")]

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PySlice, PyTuple};
use vmcore::memory::MemoryError;
use vmcore::{GuestAddress, GuestMemory, MemoryRegion};

use crate::error::{self, Raise};

/// The guest's memory, by guest-physical addresses. May be used from any thread, while the guest runs too.
#[pyclass(frozen, module = "vmcore")]
#[derive(Debug)]
pub struct Memory {
    pub memory: GuestMemory,
    pub closed: Arc<AtomicBool>,
}

impl Memory {
    fn open(&self) -> PyResult<&GuestMemory> {
        if self.closed.load(Ordering::Acquire) {
            return Err(error::closed("the memory of a VM"));
        }
        Ok(&self.memory)
    }

    /// The range that `key` means: an address, or a slice of them.
    fn range(&self, key: &Bound<'_, PyAny>) -> PyResult<(u64, usize)> {
        if let Ok(at) = key.extract::<u64>() {
            return Ok((at, 1));
        }
        let slice = key
            .cast::<PySlice>()
            .map_err(|_| PyTypeError::new_err("memory is indexed by an address or a slice of addresses"))?;
        if !slice.getattr("step")?.is_none() {
            return Err(error::config("slice of memory", slice.to_string(), "leave out the step"));
        }
        // No negative ones, which would count from an end that memory with holes does not have.
        let invalid =
            || error::config("slice of memory", slice.to_string(), "give both addresses, the lower first");
        let from: u64 = slice.getattr("start")?.extract().map_err(|_| invalid())?;
        let to: u64 = slice.getattr("stop")?.extract().map_err(|_| invalid())?;
        let len = to.checked_sub(from).and_then(|len| usize::try_from(len).ok()).ok_or_else(invalid)?;
        Ok((from, len))
    }

    fn bytes<'py>(&self, py: Python<'py>, at: u64, len: usize) -> PyResult<Bound<'py, PyBytes>> {
        let memory = self.open()?;
        // Before any memory of the host's is taken for it.
        if !memory.contains(GuestAddress(at), len as u64) {
            let mapped_end = memory.snapshot().find(GuestAddress(at)).and_then(|region| region.range().end());
            return Err(MemoryError::NotMapped { base: at, len: len as u64, mapped_end }).raise();
        }
        PyBytes::new_with(py, len, |buffer| memory.read(GuestAddress(at), buffer).raise())
    }
}

#[pymethods]
impl Memory {
    /// Copies `length` bytes of guest memory from address `at`.
    #[pyo3(signature = (at, length))]
    fn read<'py>(&self, py: Python<'py>, at: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        self.bytes(py, at, length)
    }

    /// Copies `data` to guest memory at address `at`. A write that fails has changed nothing.
    #[pyo3(signature = (at, data))]
    fn write(&self, at: u64, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let memory = self.open()?;
        if let Ok(bytes) = data.cast::<PyBytes>() {
            return memory.write(GuestAddress(at), bytes.as_bytes()).raise();
        }
        let bytes = pyo3::buffer::PyBuffer::<u8>::get(data)?.to_vec(data.py())?;
        memory.write(GuestAddress(at), &bytes).raise()
    }

    /// Sets `length` bytes from `at` to zero.
    #[pyo3(signature = (at, length))]
    fn zero(&self, py: Python<'_>, at: u64, length: u64) -> PyResult<()> {
        let memory = self.open()?;
        py.detach(|| memory.zero(GuestAddress(at), length)).raise()
    }

    /// The values at `at` by `layout`: a format or `Struct` of the module struct gives a tuple, a class of
    /// ctypes one of its instances, a copy.
    #[pyo3(signature = (at, layout))]
    fn read_struct<'py>(&self, at: u64, layout: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = layout.py();
        if layout.hasattr("from_buffer_copy")? {
            let size = py.import("ctypes")?.call_method1("sizeof", (layout,))?.extract()?;
            return layout.call_method1("from_buffer_copy", (self.bytes(py, at, size)?,));
        }
        let layout = compiled(layout)?;
        let size = layout.getattr("size")?.extract()?;
        layout.call_method1("unpack", (self.bytes(py, at, size)?,))
    }

    /// Writes `values` at `at` by `layout`, a format or `Struct` of the module struct.
    #[pyo3(signature = (at, layout, *values))]
    fn write_struct(&self, at: u64, layout: &Bound<'_, PyAny>, values: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.write(at, &compiled(layout)?.call_method1("pack", values)?)
    }

    /// The regions that there are, sorted by base.
    #[getter]
    fn regions(&self) -> PyResult<Vec<Region>> {
        let memory = self.open()?;
        Ok(memory.snapshot().regions().iter().map(|region| Region(region.clone())).collect())
    }

    /// Sum of the lengths of all regions, in bytes.
    fn __len__(&self) -> PyResult<usize> {
        Ok(usize::try_from(self.open()?.total_bytes()).unwrap_or(usize::MAX))
    }

    fn __getitem__<'py>(&self, key: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let (at, len) = self.range(key)?;
        let bytes = self.bytes(key.py(), at, len)?;
        if key.is_instance_of::<PySlice>() { Ok(bytes.into_any()) } else { bytes.get_item(0) }
    }

    fn __setitem__(&self, key: &Bound<'_, PyAny>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let (at, len) = self.range(key)?;
        if !key.is_instance_of::<PySlice>() {
            let byte: u8 = value.extract()?;
            return self.open()?.write(GuestAddress(at), &[byte]).raise();
        }
        let given = value.len()?;
        if given != len {
            let fix = format!("give {len} bytes: memory does not change its size");
            return Err(error::config("bytes for a slice of memory", given.to_string(), fix));
        }
        self.write(at, value)
    }

    /// Whether `at` is an address of memory.
    fn __contains__(&self, at: u64) -> PyResult<bool> {
        Ok(self.open()?.contains(GuestAddress(at), 1))
    }

    /// All of the memory, where that is one region; else take the one that is meant from `regions`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let regions = slf.get().regions()?;
        let [region] = &regions[..] else {
            let ranges = slf.get().memory.ranges().iter().map(ToString::to_string).collect::<Vec<_>>();
            let text =
                format!("the memory is not in one piece ({}): take one of its regions", ranges.join(", "));
            return Err(PyBufferError::new_err(text));
        };
        let region = Bound::new(slf.py(), Region(region.0.clone()))?;
        // SAFETY: `view` is the caller's, by the protocol; `region` becomes the view's owner.
        unsafe { Region::export(region, view, flags) }
    }

    fn __repr__(&self) -> String {
        let ranges = self.memory.ranges().iter().map(ToString::to_string).collect::<Vec<_>>();
        format!("<Memory {}>", ranges.join(" "))
    }
}

/// A `struct.Struct` of a format.
fn compiled<'py>(layout: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    static STRUCT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let class = STRUCT.import(layout.py(), "struct", "Struct")?;
    if layout.is_instance(class)? { Ok(layout.clone()) } else { class.call1((layout,)) }
}

/// One piece of guest memory, which is a buffer: `memoryview(region)`, `numpy.frombuffer(region, "u1")`.
///
/// It stays mapped while a buffer of it lives, also after the VM is closed; then nothing else uses it. The
/// guest changes the bytes at any time. What is written through a buffer is noticed by dirty tracking and
/// by the software CPU, which keeps decoded instructions, when the buffer is released, or `written` says so.
#[pyclass(frozen, module = "vmcore")]
pub struct Region(pub Arc<MemoryRegion>);

impl Region {
    /// Fills `view` with all of `region`.
    ///
    /// # Safety
    /// `view` is null, or may be written.
    unsafe fn export(region: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let inner = &region.get().0;
        let (Ok(len), address) = (isize::try_from(inner.len()), inner.host_address()) else {
            return Err(PyBufferError::new_err("the region is larger than a buffer can be"));
        };
        let read_only = c_int::from(inner.is_read_only());
        // SAFETY: the caller's promise for `view`. `len` bytes from `address` are mapped while `region` lives,
        // which the call makes the view's owner: it holds a reference until the view is released. That the
        // guest changes the bytes meanwhile is what buffers of shared memory are; Python reads them as plain
        // bytes and believes nothing of them. With `read_only` a writable view is refused.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(view, region.as_ptr(), address.cast::<c_void>(), len, read_only, flags)
        };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(region.py())) }
    }
}

#[pymethods]
impl Region {
    /// First guest-physical address.
    #[getter]
    fn base(&self) -> u64 {
        self.0.base().0
    }

    /// Whether the guest cannot write it.
    #[getter]
    fn read_only(&self) -> bool {
        self.0.is_read_only()
    }

    /// Says that `length` bytes at `offset` from the base were written through a buffer.
    #[pyo3(signature = (offset = 0, length = u64::MAX))]
    fn written(&self, offset: u64, length: u64) {
        self.0.written(offset, length);
    }

    fn __len__(&self) -> usize {
        usize::try_from(self.0.len()).unwrap_or(usize::MAX)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        // SAFETY: `view` is the caller's, by the protocol.
        unsafe { Self::export(slf, view, flags) }
    }

    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: by the protocol it is a view that `__getbuffer__` has filled.
        let read_only = unsafe { (*view).readonly };
        if read_only == 0 {
            self.0.written(0, u64::MAX);
        }
    }

    fn __repr__(&self) -> String {
        format!("<Region {}>", self.0.range())
    }
}
