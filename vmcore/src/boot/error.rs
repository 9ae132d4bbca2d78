//! What is wrong with an image, or with the place it should go.

use std::io;

use crate::memory::{GpaRange, MemoryError};

/// Why an image cannot be booted.
///
/// `image` is what the embedder named: "kernel /boot/vmlinuz", "initrd (12 bytes in memory)".
/// Offsets are bytes from the beginning of the image; addresses are guest-physical.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file cannot be opened.
    #[error("cannot open {image}: {source}; check the path and its permissions")]
    Open {
        /// The image.
        image: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file cannot be read.
    #[error("cannot read {len} bytes at offset {offset:#x} of {image}: {source}")]
    Read {
        /// The image.
        image: String,
        /// Where, in bytes.
        offset: u64,
        /// How much, in bytes.
        len: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// The image ends before something that it announces.
    #[error(
        "{image} is truncated: its {what} at offset {offset:#x} needs {needed} bytes, the image has {available} there; copy or build it again"
    )]
    Truncated {
        /// The image.
        image: String,
        /// What does not fit.
        what: &'static str,
        /// Where it begins, in bytes.
        offset: u64,
        /// Bytes it needs.
        needed: u64,
        /// Bytes there are from `offset`.
        available: u64,
    },
    /// The image is none of the formats asked for.
    #[error("{image} is not {expected}: it begins with {found}; {fix}")]
    Unrecognised {
        /// The image.
        image: String,
        /// The formats that would do.
        expected: &'static str,
        /// Its first bytes in hexadecimal.
        found: String,
        /// What to do instead.
        fix: &'static str,
    },
    /// A field of the image has a value that makes no sense.
    #[error("{image} is invalid: {field} at offset {offset:#x} is {value:#x}, expected {expected}")]
    Invalid {
        /// The image.
        image: String,
        /// The field, by its name in the format's specification.
        field: &'static str,
        /// Where it is, in bytes.
        offset: u64,
        /// Its value.
        value: u64,
        /// Which values are valid.
        expected: &'static str,
    },
    /// The image is well-formed but asks for something that is not there.
    #[error("{image}: {what} is not supported; {fix}")]
    Unsupported {
        /// The image.
        image: String,
        /// What it needs.
        what: String,
        /// What to do instead.
        fix: &'static str,
    },
    /// Compressed data is corrupt.
    #[error("the {format} data of {image} is corrupt {position} bytes into its output: {source}")]
    Decompress {
        /// The image.
        image: String,
        /// The compression: "gzip", "lz4", ...
        format: &'static str,
        /// How many bytes came out before.
        position: u64,
        /// What the decompressor said.
        source: io::Error,
    },
    /// Compressed data unpacks to another length than the image says.
    #[error(
        "the {format} data of {image} unpacks to {found} bytes, the image says {expected}; copy or build it again"
    )]
    PayloadLength {
        /// The image.
        image: String,
        /// The compression.
        format: &'static str,
        /// The length that the image states, in bytes.
        expected: u64,
        /// The length it has, in bytes.
        found: u64,
    },
    /// Something is larger than all the memory it may use.
    #[error("{what} of {image} is larger than {limit} bytes, which is {limit_is}; {fix}")]
    TooLarge {
        /// The image.
        image: String,
        /// What is too large: "the unpacked payload", "the command line".
        what: &'static str,
        /// The most it may have, in bytes.
        limit: u64,
        /// What that limit is.
        limit_is: &'static str,
        /// What to do.
        fix: &'static str,
    },
    /// The place that an image asks for is not guest memory.
    #[error("{what} goes to {range}, which is not all guest memory (memory is {memory}); {fix}")]
    NotInMemory {
        /// What was to be loaded.
        what: String,
        /// Where.
        range: GpaRange,
        /// The memory there is.
        memory: String,
        /// What to do.
        fix: &'static str,
    },
    /// Nowhere in the memory allowed is there room.
    #[error(
        "no room for {what} ({len:#x} bytes) in {window} of memory {memory}, beside {taken}; give the VM more memory or use smaller images"
    )]
    NoRoom {
        /// What was to be placed.
        what: String,
        /// Its length in bytes.
        len: u64,
        /// Where it was allowed to go.
        window: GpaRange,
        /// The memory there is.
        memory: String,
        /// What is there already.
        taken: String,
    },
    /// Two things want the same memory.
    #[error("{what} at {range} overlaps {other} at {other_range}; move one of them")]
    Overlap {
        /// What was to be loaded.
        what: String,
        /// Where.
        range: GpaRange,
        /// What is there.
        other: String,
        /// Where that is.
        other_range: GpaRange,
    },
    /// A text for the guest that contains a zero byte.
    #[error("{what} has a zero byte at {position}, which would end it there; remove it")]
    ZeroByte {
        /// Which text.
        what: &'static str,
        /// Where in it, in bytes.
        position: usize,
    },
    /// The host gives no random bytes.
    #[error("cannot get random bytes for the guest's seed: {source}; boot with RngSeed::None")]
    Seed {
        /// What the operating system said.
        source: io::Error,
    },
    /// A description of the machine that no table can express.
    #[error("cannot describe {what} in the {table}: {value}; {fix}")]
    Table {
        /// What was to be described.
        what: String,
        /// Which table: "DSDT", "MADT", "MP table", "e820 map".
        table: &'static str,
        /// The value that does not fit.
        value: String,
        /// Which values do.
        fix: &'static str,
    },
    /// Guest memory cannot be written.
    #[error("cannot load {what}: {source}")]
    Memory {
        /// What was being loaded.
        what: String,
        /// Why not.
        source: MemoryError,
    },
}

impl BootError {
    /// Its code, as [`crate::Error::code`] has it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Open { .. } => "boot.open",
            Self::Read { .. } => "boot.read",
            Self::Truncated { .. } => "boot.truncated",
            Self::Unrecognised { .. } => "boot.unrecognised",
            Self::Invalid { .. } => "boot.invalid",
            Self::Unsupported { .. } => "boot.unsupported",
            Self::Decompress { .. } => "boot.decompress",
            Self::PayloadLength { .. } => "boot.payload_length",
            Self::TooLarge { .. } => "boot.too_large",
            Self::NotInMemory { .. } => "boot.not_in_memory",
            Self::NoRoom { .. } => "boot.no_room",
            Self::Overlap { .. } => "boot.overlap",
            Self::ZeroByte { .. } => "boot.zero_byte",
            Self::Seed { .. } => "boot.seed",
            Self::Table { .. } => "boot.table",
            Self::Memory { .. } => "boot.memory",
        }
    }

    /// What to do about it, where the text says so.
    pub fn fix(&self) -> Option<&str> {
        Some(match self {
            Self::Open { .. } => "check the path and its permissions",
            Self::Truncated { .. } | Self::PayloadLength { .. } => "copy or build it again",
            Self::Unrecognised { fix, .. }
            | Self::Unsupported { fix, .. }
            | Self::TooLarge { fix, .. }
            | Self::NotInMemory { fix, .. }
            | Self::Table { fix, .. } => fix,
            Self::NoRoom { .. } => "give the VM more memory or use smaller images",
            Self::Overlap { .. } => "move one of them",
            Self::ZeroByte { .. } => "remove it",
            Self::Seed { .. } => "boot with RngSeed::None",
            Self::Memory { source, .. } => return source.fix(),
            Self::Read { .. } | Self::Invalid { .. } | Self::Decompress { .. } => return None,
        })
    }
}
