//! Virtio devices written in Python: requests in, answers out.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vmcore::{GuestMemory, Result};
use vmdevices::virtio::{
    Activation, Chain, DeviceType, Progress, QueueError, VirtQueue, VirtioDevice, Worker, read_config_bytes,
};

use crate::callback::Sink;
use crate::error;

/// Requests served before others have a turn.
const TURN: usize = 16;

/// Most bytes of a request and of an answer: the guest chooses how many it offers.
const MOST: usize = 1 << 20;

/// A device by an object with `device_type`, `queue_sizes`, `features`, `config` and
/// `handle(queue, request, room)`.
pub struct PythonVirtio {
    object: Arc<Py<PyAny>>,
    sink: Arc<Sink>,
    device_type: u32,
    features: u64,
    queue_sizes: Vec<u16>,
}

impl PythonVirtio {
    pub fn new(object: &Bound<'_, PyAny>, sink: &Arc<Sink>) -> PyResult<Self> {
        let queue_sizes: Vec<u16> = object.getattr("queue_sizes")?.extract()?;
        if queue_sizes.is_empty() || queue_sizes.iter().any(|&size| !size.is_power_of_two() || size > 32768) {
            let fix = "give each queue a power of two up to 32768";
            return Err(error::config("queue sizes of a virtio device", format!("{queue_sizes:?}"), fix));
        }
        Ok(Self {
            device_type: object.getattr("device_type")?.extract()?,
            features: object.getattr("features")?.extract()?,
            object: Arc::new(object.clone().unbind()),
            sink: sink.clone(),
            queue_sizes,
        })
    }
}

impl VirtioDevice for PythonVirtio {
    fn device_type(&self) -> DeviceType {
        DeviceType(self.device_type)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.queue_sizes.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.sink.call(|py| self.object.bind(py).getattr("config")?.extract::<Vec<u8>>());
        read_config_bytes(&config.unwrap_or_default(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let object = &self.object;
        self.sink.call(|py| {
            object.bind(py).call_method1("write_config", (offset, PyBytes::new(py, data))).map(drop)
        });
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Worker>>> {
        let Activation { memory, queues, features, .. } = activation;
        let object = &self.object;
        self.sink.call(|py| object.bind(py).call_method1("activate", (features,)).map(drop));
        let (object, sink) = (self.object.clone(), self.sink.clone());
        Ok(vec![Box::new(PythonWorker { object, sink, memory, queues })])
    }
}

struct PythonWorker {
    object: Arc<Py<PyAny>>,
    sink: Arc<Sink>,
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
}

impl Worker for PythonWorker {
    fn queues(&mut self) -> &mut [VirtQueue] {
        &mut self.queues
    }

    fn notify(&mut self, queue: u16) -> std::result::Result<Progress, QueueError> {
        let map = self.memory.snapshot();
        let Some(ring) = self.queues.iter_mut().find(|ring| ring.index() == queue) else {
            return Ok(Progress::Idle);
        };
        let (object, sink) = (&self.object, &self.sink);
        ring.serve(&map, TURN, 1, |chain| answer(object, sink, queue, chain))
    }
}

fn answer(
    object: &Py<PyAny>,
    sink: &Sink,
    queue: u16,
    chain: &mut Chain<'_>,
) -> std::result::Result<u32, QueueError> {
    if chain.readable.len() > MOST {
        return Err(QueueError::Request { queue, what: "a request of more than 1 MiB" });
    }
    let mut request = vec![0; chain.readable.len()];
    chain.readable.read(&mut request);
    let room = chain.writable.len().min(MOST);
    let answer = sink.call(|py| {
        let answer = object.bind(py).call_method1("handle", (queue, PyBytes::new(py, &request), room))?;
        let answer: Vec<u8> = if answer.is_none() { Vec::new() } else { answer.extract()? };
        if answer.len() > room {
            let fix = format!("give {room} at most, as handle is told");
            return Err(error::config("bytes of an answer", answer.len().to_string(), fix));
        }
        Ok(answer)
    });
    let written = chain.writable.write(&answer.unwrap_or_default());
    Ok(u32::try_from(written).unwrap_or(u32::MAX))
}
