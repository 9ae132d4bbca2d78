//! Hand-made images through the whole of [`load`], and damaged ones.

use std::io::{Read, Write};
use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::memory::{GpaRange, MemoryRegion};
use crate::state::Segment;

const MIB: u64 = 1 << 20;
/// Where the test kernels are linked.
const BASE: u64 = 16 * MIB;
const XLF_KERNEL_64: u16 = 1;

fn machine(bytes: u64) -> (GuestMemory, MemoryLayout) {
    let layout = MemoryLayout::pc(bytes);
    let memory = GuestMemory::new();
    for ram in layout.ram() {
        memory.insert(MemoryRegion::anonymous(GuestAddress(ram.base), ram.len).unwrap().into()).unwrap();
    }
    (memory, layout)
}

fn boot(boot: impl Into<Boot>, bytes: u64) -> Result<(Loaded, GuestMemory), BootError> {
    let (memory, layout) = machine(bytes);
    let loaded = load(&boot.into(), &memory, &layout, Some(GuestAddress(0xe_0000)))?;
    Ok((loaded, memory))
}

fn bytes_at(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(GuestAddress(at), &mut bytes).unwrap();
    bytes
}

fn text_at(memory: &GuestMemory, at: u64) -> String {
    let bytes = bytes_at(memory, at, 256);
    String::from_utf8(bytes.split(|b| *b == 0).next().unwrap().to_vec()).unwrap()
}

fn u32_at(memory: &GuestMemory, at: u64) -> u64 {
    memory.load::<u32>(GuestAddress(at)).unwrap().into()
}

fn u64_at(memory: &GuestMemory, at: u64) -> u64 {
    memory.load(GuestAddress(at)).unwrap()
}

/// One program header to write: kind, address, bytes, length in memory.
struct Part<'a>(u32, u64, &'a [u8], u64);

/// An ELF file with these parts, the first byte of the first one being the entry.
fn elf(is_64: bool, entry: u64, parts: &[Part<'_>]) -> Vec<u8> {
    let word = |value: u64| value.to_le_bytes()[..if is_64 { 8 } else { 4 }].to_vec();
    let (header, program) = if is_64 { (64u16, 56u16) } else { (52, 32) };
    let machine: u16 = if is_64 { 62 } else { 3 };
    let mut file = vec![0x7f, b'E', b'L', b'F', if is_64 { 2 } else { 1 }, 1, 1];
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(word(entry));
    file.extend(word(header.into()));
    file.extend(word(0));
    file.extend(0u32.to_le_bytes());
    for field in [header, program, u16::try_from(parts.len()).unwrap(), 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    let mut offset = u64::from(header) + u64::from(program) * parts.len() as u64;
    for Part(kind, address, bytes, memsz) in parts {
        let len = bytes.len() as u64;
        file.extend(kind.to_le_bytes());
        if is_64 {
            file.extend(7u32.to_le_bytes());
        }
        for value in [offset, 0xffff_8000, *address, len, *memsz] {
            file.extend(word(value));
        }
        if !is_64 {
            file.extend(7u32.to_le_bytes());
        }
        file.extend(word(4));
        offset += len;
    }
    for Part(_, _, bytes, _) in parts {
        file.extend(*bytes);
    }
    file
}

/// Something that compresses but not to nothing, large enough for several blocks of each format.
fn text(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut text = Vec::new();
    while text.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        text.extend_from_slice(format!("line {} of {}\n", state >> 20, text.len()).as_bytes());
    }
    text.truncate(len);
    text
}

fn kernel(body: &[u8]) -> Vec<u8> {
    elf(
        true,
        BASE + 16,
        &[Part(1, BASE, body, body.len() as u64 + 8192), Part(1, BASE + 16 * MIB, b"data", 4)],
    )
}

fn lzop(data: &[u8]) -> Vec<u8> {
    let mut out = b"\x89LZO\0\r\n\x1a\n\x10\x30\x20\xa0\x09\x40\x01\x05".to_vec();
    out.extend(1u32.to_be_bytes());
    out.extend([0; 12]);
    out.extend([0; 5]);
    for block in data.chunks(256 << 10) {
        let packed = lzokay_native::compress(block).unwrap();
        let mut sums = (1u32, 0u32);
        for &byte in block {
            sums.0 = (sums.0 + u32::from(byte)) % 65521;
            sums.1 = (sums.1 + sums.0) % 65521;
        }
        out.extend(u32::try_from(block.len()).unwrap().to_be_bytes());
        let stored = packed.len() >= block.len();
        let body = if stored { block } else { &packed };
        out.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        out.extend((sums.1 << 16 | sums.0).to_be_bytes());
        out.extend(body);
    }
    out.extend(0u32.to_be_bytes());
    out
}

fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    let mut out = b"\x02\x21\x4c\x18".to_vec();
    for block in data.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        out.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
        out.extend(packed);
    }
    out
}

fn lzma(data: &[u8], xz: bool) -> Vec<u8> {
    use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
    let options = LzmaOptions::new_preset(6).unwrap();
    let stream = if xz {
        // As the kernel's build does: x86 branch filter, CRC32.
        let mut filters = Filters::new();
        filters.x86();
        filters.lzma2(&options);
        Stream::new_stream_encoder(&filters, Check::Crc32)
    } else {
        Stream::new_lzma_encoder(&options)
    };
    let mut out = Vec::new();
    liblzma::read::XzEncoder::new_stream(data, stream.unwrap()).read_to_end(&mut out).unwrap();
    out
}

/// `data` in every compression, with its name and as the kernel's build leaves it: all but gzip
/// with the length appended.
fn compressed(data: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(data).unwrap();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    bzip2.write_all(data).unwrap();
    let mut all = vec![
        ("bzip2", bzip2.finish().unwrap()),
        ("lzma", lzma(data, false)),
        ("xz", lzma(data, true)),
        ("lzo", lzop(data)),
        ("lz4", lz4_legacy(data)),
        ("zstd", zstd::encode_all(data, 19).unwrap()),
    ];
    for (_, bytes) in &mut all {
        bytes.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    }
    all.push(("gzip", gzip.finish().unwrap()));
    all
}

/// A bzImage of protocol 2.15 with one setup sector, `code` and a payload behind it.
fn bzimage(code: &[u8], payload: &[u8], xloadflags: u16) -> Vec<u8> {
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    let paragraphs = u32::try_from((code.len() + payload.len()).div_ceil(16)).unwrap();
    put(0x1f4, &paragraphs.to_le_bytes());
    put(0x1fe, &0xAA55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x20e, &0x0100u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &xloadflags.to_le_bytes());
    put(0x238, &100u32.to_le_bytes());
    put(0x248, &u32::try_from(code.len()).unwrap().to_le_bytes());
    put(0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes());
    put(0x258, &BASE.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    put(0x300, b"6.1.0-test (x@y) #1\0");
    image.extend(code);
    image.extend(payload);
    image
}

#[test]
fn every_compression_unpacks_to_the_same_kernel() {
    // More than one block of each format; those of LZ4 are 8 MiB.
    let (small, large) = (text(1 << 20), text(9 << 20));
    let mut large_payload = lz4_legacy(&kernel(&large));
    large_payload.extend(u32::try_from(kernel(&large).len()).unwrap().to_le_bytes());
    let small = compressed(&kernel(&small)).into_iter().map(|(name, payload)| (name, payload, &small));
    for (name, payload, body) in small.chain([("lz4", large_payload, &large)]) {
        let image = bzimage(&[0x90; 256], &payload, XLF_KERNEL_64);
        let (loaded, memory) = boot(Linux::new(image), 64 * MIB).unwrap();
        assert!(loaded.what.contains(name) && loaded.what.contains("6.1.0-test"), "{}", loaded.what);
        assert_eq!(loaded.entry.regs.rip, BASE + 16);
        assert_eq!(loaded.entry.sregs.cs, Segment::long_code(0x10));
        assert!(bytes_at(&memory, BASE, body.len()) == *body, "{name}");
        assert_eq!(bytes_at(&memory, BASE + 16 * MIB, 4), b"data");
    }
}

#[test]
fn the_zero_page_tells_linux_what_the_boot_protocol_asks() {
    let payload = lz4_legacy(&kernel(&text(5000)));
    let payload = [&payload[..], &5184u32.to_le_bytes()].concat();
    let image = bzimage(&[], &payload, XLF_KERNEL_64);
    let initrd = text(10_000);
    let linux = Linux::new(image.clone()).initrd(initrd.clone()).cmdline("console=ttyS0 panic=-1");
    let error = boot(linux.clone(), 6 << 30).unwrap_err();
    let BootError::PayloadLength { expected: 5184, found, .. } = error else { panic!("{error}") };
    let payload_len = u32::try_from(found).unwrap().to_le_bytes();
    let at = image.len() - 4;
    let image = [&image[..at], &payload_len].concat();
    let mut linux = linux;
    linux.kernel = image.clone().into();

    let (loaded, memory) = boot(linux, 6 << 30).unwrap();
    let page = loaded.entry.regs.rsi;
    assert_eq!(bytes_at(&memory, page + 0x1f1, 0x20f - 0x1f1), image[0x1f1..0x20f]);
    assert_eq!(bytes_at(&memory, page + 0x210, 1), [0xff]);
    assert_eq!(u64_at(&memory, page + 0x70), 0xe_0000);
    let (start, len) = (u32_at(&memory, page + 0x218), u32_at(&memory, page + 0x21c));
    assert_eq!((start + len, start % 4096), (0x8000_0000 - (4096 - len % 4096), 0));
    assert_eq!(bytes_at(&memory, start, initrd.len()), initrd);
    assert_eq!(text_at(&memory, u32_at(&memory, page + 0x228)), "console=ttyS0 panic=-1");
    let count = bytes_at(&memory, page + 0x1e8, 1)[0];
    let map: Vec<_> = (0..u64::from(count))
        .map(|n| page + 0x2d0 + n * 20)
        .map(|at| (u64_at(&memory, at), u64_at(&memory, at + 8), u32_at(&memory, at + 16)))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (MIB, (3 << 30) - MIB, 1),
            (0xfffb_c000, 0x4000, 2),
            (4 << 30, 3 << 30, 1),
        ]
    );
    // Zero page, command line and tables are where RAM is, each in its own place.
    assert!(page < 0x9_fc00 && loaded.entry.sregs.cr3 < 0x9_fc00 && page != loaded.entry.sregs.cr3);
}

/// The entries of the `setup_data` chain that the zero page begins: type and contents.
fn setup_data(memory: &GuestMemory, page: u64) -> Vec<(u64, Vec<u8>)> {
    let mut entries = vec![];
    let mut next = u64_at(memory, page + 0x250);
    while next != 0 {
        let len = usize::try_from(u32_at(memory, next + 12)).unwrap();
        entries.push((u32_at(memory, next + 8), bytes_at(memory, next + 16, len)));
        next = u64_at(memory, next);
    }
    entries
}

#[test]
fn linux_gets_a_new_seed_at_each_boot_or_the_one_that_is_given() {
    let seeds = |linux: Linux| {
        let (loaded, memory) = boot(linux, 64 * MIB).unwrap();
        setup_data(&memory, loaded.entry.regs.rsi)
    };
    let unpacks_itself = bzimage(&text(3000), b"?", XLF_KERNEL_64);
    for image in [kernel(b"vmlinux"), unpacks_itself.clone()] {
        let linux = Linux::new(image);
        let (first, second) = (seeds(linux.clone()), seeds(linux.clone()));
        assert_eq!((first.len(), first[0].0, first[0].1.len()), (1, 9, 32));
        assert_ne!(first, second);
        assert_eq!(seeds(linux.clone().rng_seed(RngSeed::Fixed([7; 32]))), [(9, vec![7; 32])]);
        assert_eq!(seeds(linux.rng_seed(RngSeed::None)), []);
    }
    // Before 2.09 there is something else at that place.
    let mut old = unpacks_itself;
    old[0x206] = 8;
    assert_eq!(seeds(Linux::new(old)), []);
    assert!(!format!("{:?}", Linux::new("k").rng_seed(RngSeed::Fixed([0xab; 32]))).contains("171"));
}

#[test]
fn a_bzimage_with_an_unknown_payload_unpacks_itself() {
    let code = text(3000);
    let plain = elf(false, BASE, &[Part(1, BASE, b"i386", 4)]);
    let mut packed = zstd::encode_all(&b"no ELF in here"[..], 1).unwrap();
    packed.extend(14u32.to_le_bytes());
    for payload in [b"what is this?".to_vec(), packed] {
        for (flags, offset, cr0_pg) in [(XLF_KERNEL_64, 0x200, true), (0, 0, false)] {
            let image = bzimage(&code, &payload, flags);
            let (loaded, memory) = boot(Linux::new(image.clone()), 64 * MIB).unwrap();
            assert_eq!(loaded.entry.regs.rip, BASE + offset);
            assert_eq!(loaded.entry.sregs.cr0 >> 31 == 1, cr0_pg);
            assert_eq!(bytes_at(&memory, BASE, code.len()), code);
            let error = boot(Linux::new(image).entry(LinuxEntry::Payload), 64 * MIB).unwrap_err();
            assert!(matches!(error, BootError::Unsupported { .. }), "{error}");
        }
    }
    // A 32-bit kernel is entered in 32-bit mode, whatever the container says.
    let mut payload = zstd::encode_all(&plain[..], 1).unwrap();
    payload.extend(u32::try_from(plain.len()).unwrap().to_le_bytes());
    let (loaded, _) = boot(Linux::new(bzimage(&code, &payload, 0)), 64 * MIB).unwrap();
    assert_eq!((loaded.entry.regs.rip, loaded.entry.sregs.efer), (BASE, 0));
}

#[test]
fn a_vmlinux_boots_packed_or_not_and_memory_of_an_earlier_boot_is_cleared() {
    let vmlinux = kernel(b"a vmlinux of one line.");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&vmlinux).unwrap();
    for image in [vmlinux, gzip.finish().unwrap()] {
        let (memory, layout) = machine(64 * MIB);
        memory.write(GuestAddress(BASE), &[0xaa; 12_000]).unwrap();
        let boot = Linux::new(image).cmdline("x").into();
        let loaded = load(&boot, &memory, &layout, None).unwrap();
        assert_eq!(loaded.entry.regs.rip, BASE + 16);
        assert_eq!(bytes_at(&memory, BASE, 22), b"a vmlinux of one line.");
        assert_eq!(bytes_at(&memory, BASE + 22, 8192), [0; 8192]);
        assert_eq!(bytes_at(&memory, BASE + 22 + 8192, 1), [0xaa]);
        assert_eq!(bytes_at(&memory, loaded.entry.regs.rsi + 0x202, 4), b"HdrS");
    }
}

#[test]
fn a_small_image_cannot_unpack_to_more_than_the_guests_memory() {
    // 1 GiB of zeroes, in 32 KiB and less.
    let mut bomb = zstd::Encoder::new(Vec::new(), 19).unwrap();
    let zeroes = vec![0; 1 << 20];
    bomb.write_all(&kernel(&[0; 64])).unwrap();
    for _ in 0..1024 {
        bomb.write_all(&zeroes).unwrap();
    }
    let mut bomb = bomb.finish().unwrap();
    bomb.extend([0; 4]);
    assert!(bomb.len() < 128 << 10, "{}", bomb.len());
    for image in [bzimage(&[], &bomb, 1), bomb[..bomb.len() - 4].to_vec()] {
        let error = boot(Linux::new(image), 64 * MIB).unwrap_err();
        assert!(matches!(error, BootError::TooLarge { limit, .. } if limit == 64 * MIB), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_named_with_both_sides() {
    let vmlinux = kernel(&text(100));
    let error = boot(Linux::new(vmlinux.clone()), 8 * MIB).unwrap_err();
    assert!(matches!(error, BootError::NotInMemory { .. }), "{error}");

    let initrd = vec![1; 40 << 20];
    let error = boot(Linux::new(vmlinux.clone()).initrd(initrd), 48 * MIB).unwrap_err();
    assert!(matches!(error, BootError::NoRoom { .. }) && error.to_string().contains("initrd"), "{error}");

    let error = boot(Linux::new(vmlinux.clone()).cmdline("x".repeat(2048)), 64 * MIB).unwrap_err();
    assert!(matches!(error, BootError::TooLarge { limit: 2047, .. }), "{error}");
    let error = boot(Linux::new(vmlinux.clone()).cmdline("a\0b"), 64 * MIB).unwrap_err();
    assert!(matches!(error, BootError::ZeroByte { position: 1, .. }), "{error}");
    let error = boot(Linux::new(vmlinux).initrd(Vec::new()), 64 * MIB).unwrap_err();
    assert!(matches!(error, BootError::Truncated { .. }), "{error}");

    let twice = [Part(1, BASE, b"one", 3), Part(1, BASE + 2, b"two", 3)];
    let error = boot(Elf::new(elf(true, BASE, &twice)), 64 * MIB).unwrap_err();
    assert!(matches!(error, BootError::Overlap { .. }), "{error}");
    let error = boot(Elf::new(elf(true, BASE, &[Part(1, 0xe_0000, b"one", 3)])), 64 * MIB).unwrap_err();
    assert!(error.to_string().contains("the ACPI table area"), "{error}");
    let wraps = elf(true, BASE, &[Part(1, u64::MAX - 1, b"one", u64::MAX)]);
    assert!(matches!(boot(Elf::new(wraps), 64 * MIB), Err(BootError::NotInMemory { .. })));
}

#[test]
fn pvh_is_entered_by_its_note_with_modules_and_memory_map() {
    let mut notes = Vec::new();
    for (name, kind, value) in [(&b"GNU\0"[..], 3u32, 1u32), (b"Xen\0", 2, 0), (b"Xen\0", 18, 0x100_0010)] {
        notes.extend([4u32, 4, kind].iter().flat_map(|word| word.to_le_bytes()));
        notes.extend(name);
        notes.extend(value.to_le_bytes());
    }
    let image = elf(true, BASE, &[Part(1, BASE, b"kernel", 64), Part(4, 0, &notes, notes.len() as u64)]);
    for pvh in [
        Boot::from(Pvh::new(image.clone()).initrd(vec![7; 5000]).cmdline("pvh")),
        Linux::new(image).initrd(vec![7; 5000]).cmdline("pvh").entry(LinuxEntry::Pvh).into(),
    ] {
        let (loaded, memory) = boot(pvh, 64 * MIB).unwrap();
        assert_eq!(loaded.entry.regs.rip, 0x100_0010);
        assert_eq!((loaded.entry.sregs.cr0, loaded.entry.sregs.cs), (0x11, Segment::flat(0x10, true)));
        let info = loaded.entry.regs.rbx;
        assert_eq!((u32_at(&memory, info), u32_at(&memory, info + 4)), (0x336e_c578, 1));
        let module = u64_at(&memory, info + 16);
        assert_eq!((u32_at(&memory, info + 12), u64_at(&memory, module + 8)), (1, 5000));
        assert_eq!(bytes_at(&memory, u64_at(&memory, module), 2), [7, 7]);
        assert_eq!(text_at(&memory, u64_at(&memory, info + 24)), "pvh");
        assert_eq!(u64_at(&memory, info + 32), 0xe_0000);
        let map = u64_at(&memory, info + 40);
        assert_eq!((u64_at(&memory, map), u64_at(&memory, map + 8)), (0, 0x9_fc00));
        assert_eq!(u32_at(&memory, info + 48), 4);
    }
    let error = boot(Pvh::new(kernel(b"no note")), 64 * MIB).unwrap_err();
    assert!(matches!(error, BootError::Unrecognised { .. }), "{error}");
}

fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let checksum = 0u32.wrapping_sub(0x1BAD_B002).wrapping_sub(flags);
    let words = [0x1BAD_B002, flags, checksum];
    words.iter().chain(addresses).flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn multiboot_loads_elf_and_flat_kernels_with_modules() {
    let header = multiboot_header(3, &[]);
    let elf32 = elf(false, 0x10_0000, &[Part(1, 0x10_0000, &header, 4096)]);
    let mut flat = vec![0x90; 64];
    let at = 0x20_0040;
    flat.extend(multiboot_header(1 << 16, &[at, at - 32, 0, at + 0x1000, at + 32]));
    flat.extend(b"flat kernel");
    for (image, entry, start, text) in [
        (elf32, 0x10_0000, 0x10_0000, &header[..]),
        (flat.clone(), u64::from(at) + 32, u64::from(at) - 32, &flat[32..]),
    ] {
        let kernel =
            Multiboot::new(image).cmdline("verbose").module(vec![1; 5000], "one").module(vec![2; 10], "two");
        let (loaded, memory) = boot(kernel, 64 * MIB).unwrap();
        let regs = loaded.entry.regs;
        assert_eq!((regs.rax, regs.rip), (0x2BAD_B002, entry));
        assert_eq!(bytes_at(&memory, start, text.len()), text);
        let info = regs.rbx;
        assert_eq!(u32_at(&memory, info), 0b10_0100_1101);
        assert_eq!((u32_at(&memory, info + 4), u32_at(&memory, info + 8)), (639, 63 << 10));
        assert_eq!(text_at(&memory, u32_at(&memory, info + 16)), "verbose");
        assert_eq!(text_at(&memory, u32_at(&memory, info + 64)), "vmcore");
        let modules = u32_at(&memory, info + 24);
        let module = |n: u64| [0, 4, 8].map(|field| u32_at(&memory, modules + n * 16 + field));
        let ([first, first_end, one], [second, second_end, two]) = (module(0), module(1));
        assert_eq!((first % 4096, first_end - first, second % 4096, second_end - second), (0, 5000, 0, 10));
        assert_eq!((text_at(&memory, one), text_at(&memory, two)), ("one".into(), "two".into()));
        assert_eq!((bytes_at(&memory, first, 1)[0], bytes_at(&memory, second, 1)[0]), (1, 2));
        let (map_len, map) = (u32_at(&memory, info + 44), u32_at(&memory, info + 48));
        assert_eq!((map_len, u32_at(&memory, map), u64_at(&memory, map + 12)), (4 * 24, 20, 0x9_fc00));
    }
    for (flags, addresses) in
        [(4, vec![]), (1 << 16, vec![0, 0x10_0000, 0, 0, 0]), (1 << 16, vec![0x10_0000; 3])]
    {
        assert!(boot(Multiboot::new(multiboot_header(flags, &addresses)), 64 * MIB).is_err());
    }
}

#[test]
fn flat_images_are_entered_in_the_mode_asked_for_with_a_stack() {
    let hlt = vec![0xf4];
    let (loaded, memory) = boot(Raw::new(hlt.clone(), RawMode::Real16), MIB).unwrap();
    let state = loaded.entry;
    assert_eq!((state.regs.rip, state.sregs.cs.base, state.sregs.cr0 & 1), (0x7c00, 0, 0));
    assert!((0x900..0x7c00).contains(&state.regs.rsp));
    assert_eq!(bytes_at(&memory, 0x7c00, 1), hlt);
    assert_eq!(bytes_at(&memory, 0x400, 256), [0; 256]);

    // A BIOS where BIOSes are, and an image over everything that is reserved.
    let bios = Raw::new(vec![0xea; 0x1_0000], RawMode::Real16).load_at(0xf_0000).entry(0xf_fff0);
    let (loaded, _) = boot(bios, MIB).unwrap();
    assert_eq!((loaded.entry.regs.rip, loaded.entry.sregs.cs.selector), (0xfff0, 0xf000));
    let (loaded, _) =
        boot(Raw::new(vec![0xf4; 2 << 20], RawMode::Long64).load_at(0).stack(0x1000), 4 * MIB).unwrap();
    assert!(loaded.entry.sregs.cr3 >= 2 * MIB && loaded.entry.sregs.gdt.base >= 2 * MIB);
    assert_eq!((loaded.entry.regs.rip, loaded.entry.regs.rsp), (0, 0x1000));

    let (loaded, _) = boot(Raw::new(hlt.clone(), RawMode::Protected32).load_at(0x20_0000), 4 * MIB).unwrap();
    assert_eq!(
        (loaded.entry.regs.rip, loaded.entry.sregs.cr0, loaded.entry.sregs.efer),
        (0x20_0000, 0x11, 0)
    );
    for refused in [
        Raw::new(hlt.clone(), RawMode::Real16).load_at(0x10_0000),
        Raw::new(hlt.clone(), RawMode::Real16).stack(0x1_0000),
        Raw::new(hlt, RawMode::Long64).load_at(5 << 30),
        Raw::new(Vec::new(), RawMode::Long64),
    ] {
        assert!(boot(refused, 6 << 30).is_err());
    }
}

#[test]
fn plain_elf_files_are_entered_in_the_mode_of_their_class() {
    for (is_64, cr0) in [(true, 0x8000_0011), (false, 0x11)] {
        // Entry by physical address, and by virtual (the parts say 0xffff8000).
        for entry in [BASE + 2, 0xffff_8002] {
            let (loaded, memory) =
                boot(Elf::new(elf(is_64, entry, &[Part(1, BASE, b"code", 4)])), 64 * MIB).unwrap();
            assert_eq!((loaded.entry.regs.rip, loaded.entry.sregs.cr0), (BASE + 2, cr0));
            assert_ne!(loaded.entry.regs.rsp, 0);
            assert_eq!(bytes_at(&memory, BASE, 4), b"code");
        }
        let error = boot(Elf::new(elf(is_64, 5, &[Part(1, BASE, b"code", 4)])), 64 * MIB).unwrap_err();
        assert!(matches!(error, BootError::Invalid { field: "e_entry", .. }), "{error}");
    }
}

#[test]
fn the_layout_splits_memory_round_the_hole_and_the_map_has_no_overlaps() {
    assert_eq!(layout::ram_ranges(6 << 30)[1], GpaRange { base: 4 << 30, len: 3 << 30 });
    assert_eq!(layout::ram_ranges(3 << 30).len(), 1);
    let mut layout = MemoryLayout::pc(8 << 30);
    layout.reserve(layout::ECAM, E820Kind::Reserved, "ECAM");
    layout.reserve(GpaRange { base: 5 << 30, len: 4096 }, E820Kind::Acpi, "a table");
    let map = layout.e820();
    for pair in map.windows(2) {
        assert!(pair[0].range.end().unwrap() <= pair[1].range.base, "{pair:?}");
    }
    let ram: u64 = map.iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.range.len).sum();
    assert_eq!(ram, (8 << 30) - 4096 - 0x6_0400);
}

/// An image, and what boots it.
type Sample = (Vec<u8>, fn(Vec<u8>) -> Boot);

/// Every kind of image, small.
static SAMPLES: LazyLock<Vec<Sample>> = LazyLock::new(samples);

fn samples() -> Vec<Sample> {
    fn linux(image: Vec<u8>) -> Boot {
        Linux::new(image).into()
    }
    let vmlinux = elf(true, MIB, &[Part(1, MIB, &text(6000), 8000)]);
    let mut samples: Vec<Sample> = compressed(&vmlinux)
        .into_iter()
        .map(|(_, payload)| (bzimage(&[0x90; 64], &payload, 1), linux as fn(Vec<u8>) -> Boot))
        .collect();
    let mut notes = [4u32, 4, 18].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    notes.extend(b"Xen\0\0\0\x10\0");
    samples.push((elf(true, MIB, &[Part(1, MIB, b"x", 9), Part(4, 0, &notes, 0)]), |i| Pvh::new(i).into()));
    let header = multiboot_header(3, &[]);
    samples.push((elf(false, MIB, &[Part(1, MIB, &header, 64)]), |i| Multiboot::new(i).into()));
    let flat = multiboot_header(1 << 16, &[0x10_0000, 0x10_0000, 0, 0, 0x10_0004]);
    samples.push((flat, |i| Multiboot::new(i).into()));
    samples.push((vmlinux, linux));
    samples
}

#[test]
fn the_samples_boot_undamaged_and_every_truncation_is_a_typed_error_or_boots() {
    let (memory, layout) = machine(4 * MIB);
    for (image, make) in SAMPLES.iter() {
        load(&make(image.clone()), &memory, &layout, None).unwrap();
        for len in (0..image.len()).step_by(1 + image.len() / 200) {
            // Some bytes at the end of an image may be padding.
            let _ = load(&make(image[..len].to_vec()), &memory, &layout, None);
        }
        let half = image[..image.len() / 2].to_vec();
        assert!(load(&make(half), &memory, &layout, None).is_err());
    }
}

proptest! {
    #[test]
    fn damaged_images_never_panic(
        which in 0usize..11,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let (image, make) = &SAMPLES[which % SAMPLES.len()];
        let mut image = image.clone();
        for (at, value) in damage {
            let at = at.index(image.len());
            image[at] = value;
        }
        let (memory, layout) = machine(4 * MIB);
        if let Ok(loaded) = load(&make(image), &memory, &layout, None) {
            let code = loaded.entry.sregs.cs.base + loaded.entry.regs.rip;
            prop_assert!(code < 4 * MIB || loaded.what.contains("PVH"));
        }
    }

    #[test]
    fn damaged_headers_never_panic(
        which in 0usize..11,
        at in 0usize..0x270,
        value in prop::sample::select(vec![0u64, 1, 0x7fff_ffff, 0xffff_ffff, u64::MAX, u64::MAX - 0xfff]),
    ) {
        let (image, make) = &SAMPLES[which % SAMPLES.len()];
        let mut image = image.clone();
        let at = at % image.len();
        let end = image.len().min(at + 8);
        image[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        let (memory, layout) = machine(4 * MIB);
        let _ = load(&make(image), &memory, &layout, None);
    }

    #[test]
    fn lzo_unpacks_what_another_implementation_packed(
        words in prop::collection::vec((prop::sample::select(vec!["a", "bc", "word ", "\0\0\0\0"]), 0u8..40), 0..400),
        noise in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut data: Vec<u8> = words.iter().flat_map(|(w, n)| w.repeat((*n).into()).into_bytes()).collect();
        data.extend(noise);
        let packed = lzop(&data);
        let mut reader = lzo::Lzop::new(&packed[..]).unwrap();
        let mut out = Vec::new();
        reader.read_to_end(&mut out).unwrap();
        prop_assert_eq!(out, data);
    }
}
