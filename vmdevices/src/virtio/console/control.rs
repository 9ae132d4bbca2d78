//! What device and driver tell each other about ports (virtio 1.2, section 5.3.6.2).

use serde::{Deserialize, Serialize};

/// Length of a message without what follows it, in bytes.
pub(super) const LENGTH: usize = 8;

/// Events, `VIRTIO_CONSOLE_*`.
pub(super) mod event {
    pub(in super::super) const DEVICE_READY: u16 = 0;
    pub(in super::super) const PORT_ADD: u16 = 1;
    pub(in super::super) const PORT_READY: u16 = 3;
    pub(in super::super) const CONSOLE_PORT: u16 = 4;
    pub(in super::super) const RESIZE: u16 = 5;
    pub(in super::super) const PORT_OPEN: u16 = 6;
    pub(in super::super) const PORT_NAME: u16 = 7;
}

/// `struct virtio_console_control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Message {
    pub(super) port: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    pub(super) fn new(port: usize, event: u16, value: u16) -> Self {
        Self { port: u32::try_from(port).unwrap_or(u32::MAX), event, value }
    }

    pub(super) fn bytes(self) -> [u8; LENGTH] {
        let ([a, b, c, d], [e, f], [g, h]) =
            (self.port.to_le_bytes(), self.event.to_le_bytes(), self.value.to_le_bytes());
        [a, b, c, d, e, f, g, h]
    }

    pub(super) fn parse(bytes: [u8; LENGTH]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }
}
