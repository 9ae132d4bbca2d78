//! The header of every packet (virtio 1.2, section 5.10.6).

use crate::buffers::Buffers;

/// Length of a header in bytes.
pub(super) const HEADER: usize = 44;

/// The host's CID (section 5.10.4).
pub(super) const HOST: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const STREAM: u16 = 1;

/// Operations, `VIRTIO_VSOCK_OP_*`.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Flags of `SHUTDOWN`: who sends it will receive no more, send no more.
pub(super) mod shut {
    pub(in super::super) const RECEIVE: u32 = 1;
    pub(in super::super) const SEND: u32 = 2;
    pub(in super::super) const BOTH: u32 = RECEIVE | SEND;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes that the sender of the packet has room for in all.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has taken out of this room so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Takes a header off the front of `from`; `None` where that is too short.
    pub(super) fn read(from: &mut Buffers<'_>) -> Option<Self> {
        let mut bytes = [0; HEADER];
        if from.read(&mut bytes) < HEADER {
            return None;
        }
        let mut rest = &bytes[..];
        Some(Self {
            src_cid: u64::from_le_bytes(field(&mut rest)),
            dst_cid: u64::from_le_bytes(field(&mut rest)),
            src_port: u32::from_le_bytes(field(&mut rest)),
            dst_port: u32::from_le_bytes(field(&mut rest)),
            len: u32::from_le_bytes(field(&mut rest)),
            kind: u16::from_le_bytes(field(&mut rest)),
            op: u16::from_le_bytes(field(&mut rest)),
            flags: u32::from_le_bytes(field(&mut rest)),
            buf_alloc: u32::from_le_bytes(field(&mut rest)),
            fwd_cnt: u32::from_le_bytes(field(&mut rest)),
        })
    }

    /// The bytes of the header.
    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let parts: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        bytes.iter_mut().zip(parts.into_iter().flatten()).for_each(|(to, from)| *to = *from);
        bytes
    }

    /// The reset that answers this packet (section 5.10.6.4.2).
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// Takes one field off the front of `rest`, zeroes where there is none.
fn field<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((field, behind)) = rest.split_first_chunk() else { return [0; N] };
    *rest = behind;
    *field
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::tests::{buffers, memory};

    #[test]
    fn headers_are_laid_out_as_the_specification_has_them() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: STREAM,
            op: op::RW,
            flags: 0x4142_4344,
            buf_alloc: 0x5152_5354,
            fwd_cnt: 0x6162_6364,
        };
        let bytes = header.bytes();
        assert_eq!((bytes[0], bytes[8], bytes[16], bytes[20], bytes[24]), (8, 2, 0x14, 0x24, 0x34));
        assert_eq!((bytes[28], bytes[30], bytes[32], bytes[36], bytes[40]), (1, 5, 0x44, 0x54, 0x64));
        let memory = memory();
        let map = memory.snapshot();
        assert_eq!(buffers(&map, &[(0x7fe0, HEADER)]).write(&bytes), HEADER);
        assert_eq!(Header::read(&mut buffers(&map, &[(0x7fe0, HEADER + 1)])), Some(header));
        assert_eq!(Header::read(&mut buffers(&map, &[(0x7fe0, HEADER - 1)])), None);
        let reset = header.reset();
        assert_eq!((reset.src_cid, reset.dst_port, reset.op), (2, 0x1112_1314, op::RST));
    }
}
