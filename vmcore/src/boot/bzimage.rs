//! The bzImage container and its setup header (Linux `Documentation/arch/x86/boot.rst`).

use super::BootError;
use super::source::{Bytes, Image};

/// Where the setup header begins, in the file and in the zero page.
pub(super) const HEADER_START: usize = 0x1f1;
/// Where the zero page has something else again.
const HEADER_MAX_END: usize = 0x290;

/// "HdrS" at 0x202.
const MAGIC: u32 = 0x5372_6448;
/// "\x55\xaa" at 0x1fe.
const BOOT_FLAG: u16 = 0xAA55;
const SECTOR: u64 = 512;
/// `setup_sects` where the field is 0.
const DEFAULT_SETUP_SECTORS: u8 = 4;
/// Where the protected-mode code goes unless it can be moved.
const DEFAULT_LOAD_ADDRESS: u64 = 0x10_0000;
/// loadflags: the protected-mode code goes to 0x100000, not to 0x10000.
const LOADED_HIGH: u8 = 1;
/// xloadflags: there is a 64-bit entry 0x200 behind the 32-bit one.
const XLF_KERNEL_64: u16 = 1;

/// A parsed bzImage.
#[derive(Debug)]
pub(super) struct BzImage {
    /// The setup header as it is in the file, from [`HEADER_START`].
    pub(super) header: Vec<u8>,
    /// Where in the file the protected-mode code begins, in bytes.
    pub(super) code_offset: u64,
    /// Length of that code in bytes.
    pub(super) code_len: u64,
    /// Where the code wants to be.
    pub(super) load_address: u64,
    /// Memory it needs from there before it has looked at the memory map, in bytes.
    pub(super) init_size: u64,
    /// Highest address that the initrd may have.
    pub(super) initrd_max: u64,
    /// Longest command line, without its terminator.
    pub(super) cmdline_max: u64,
    /// Where the header has the 32-bit entry; 0 where it has none.
    pub(super) code32_start: u64,
    /// It can be entered in 64-bit mode.
    pub(super) has_64bit_entry: bool,
    /// Where in the file the compressed kernel is, and its length, in bytes.
    pub(super) payload: Option<(u64, u64)>,
    /// The kernel's version text.
    pub(super) version: Option<String>,
}

impl BzImage {
    /// Parses `image`: `None` where it is no Linux kernel with a setup header.
    pub(super) fn parse(image: &mut Image) -> Result<Option<Self>, BootError> {
        const WHAT: &str = "setup header";
        let mut sector = [0; 0x206];
        match image.read_at(WHAT, 0, &mut sector) {
            Ok(()) => {}
            Err(BootError::Truncated { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        let boot_flag: u16 = image.load(WHAT, 0x1fe)?;
        let magic: u32 = image.load(WHAT, 0x202)?;
        if boot_flag != BOOT_FLAG || magic != MAGIC {
            return Ok(None);
        }
        let protocol: u16 = image.load(WHAT, 0x206)?;
        let loadflags: u8 = image.load(WHAT, 0x211)?;
        if protocol < 0x0200 || loadflags & LOADED_HIGH == 0 {
            return Err(BootError::Unsupported {
                image: image.name().into(),
                what: format!("a zImage or a boot protocol before 2.00 (this is {protocol:#x})"),
                fix: "build the kernel as a bzImage",
            });
        }
        // The jump at 0x200 leads behind the header, so that its operand gives the length.
        let jump: u8 = image.load(WHAT, 0x201)?;
        let end = (0x202 + usize::from(jump)).clamp(0x212, HEADER_MAX_END);
        let mut padded = [0; HEADER_MAX_END];
        let header = &mut padded[HEADER_START..end];
        image.read_at(WHAT, HEADER_START as u64, header)?;
        let header = header.to_vec();
        // Fields that this version of the protocol does not have are 0.
        let field = |since: u16, at: usize, len: usize| -> u64 {
            let bytes = if protocol >= since { &padded[at..at + len] } else { &[] };
            bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
        };
        let or = |value: u64, default: u64| if value == 0 { default } else { value };

        let sectors = or(field(0x0200, 0x1f1, 1), DEFAULT_SETUP_SECTORS.into());
        let code_offset = (sectors + 1) * SECTOR;
        let available = image.len().saturating_sub(code_offset);
        let truncated = |what, offset, needed| BootError::Truncated {
            image: image.name().into(),
            what,
            offset,
            needed,
            available: image.len().saturating_sub(offset),
        };
        // `syssize` counts 16-byte paragraphs, rounded up. The last one may be cut off.
        let syssize = field(0x0204, 0x1f4, 4) * 16;
        if available == 0 || available + 15 < syssize {
            return Err(truncated("protected-mode code", code_offset, syssize));
        }
        let payload = match (field(0x0208, 0x248, 4), field(0x0208, 0x24c, 4)) {
            (_, 0) => None,
            (offset, len) => {
                let offset = code_offset + offset;
                if offset + len > image.len() {
                    return Err(truncated("compressed payload", offset, len));
                }
                Some((offset, len))
            }
        };
        let relocatable = field(0x0205, 0x234, 1) != 0;
        let preferred = field(0x020a, 0x258, 8);
        let load_address = if relocatable && preferred != 0 { preferred } else { DEFAULT_LOAD_ADDRESS };
        let version = match field(0x0200, 0x20e, 2) {
            0 => None,
            at => {
                let mut text = [0; 64];
                // Only for the log: where it is not there, there is none.
                image.read_at("version", at + SECTOR, &mut text).ok();
                let end = text.iter().position(|&b| !(0x21..0x7f).contains(&b)).unwrap_or(text.len());
                Some(String::from_utf8_lossy(&text[..end]).into_owned()).filter(|text| !text.is_empty())
            }
        };
        Ok(Some(Self {
            header,
            code_offset,
            code_len: available,
            load_address,
            init_size: field(0x020a, 0x260, 4).max(available),
            initrd_max: or(field(0x0203, 0x22c, 4), 0x37ff_ffff),
            cmdline_max: or(field(0x0206, 0x238, 4), 255),
            code32_start: field(0x0200, 0x214, 4),
            has_64bit_entry: field(0x020c, 0x236, 2) & u64::from(XLF_KERNEL_64) != 0,
            payload,
            version,
        }))
    }
}
