//! Every kind of guest memory, seen from the host: what the kernel says of the mapping
//! (`/proc/self/smaps`, `numa_maps`, `pagemap`), what files hold afterwards, and every refusal.
#![expect(clippy::unwrap_used, reason = "these are tests")]

mod no_cpu;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use no_cpu::NoCpu;
use vmcore::boot::{Raw, RawMode};
use vmcore::memory::{Backing, GpaRange, HugePages, MemoryError, NumaPolicy, PAGE_SIZE, RegionBuilder};
use vmcore::{BusDevice, Error, GuestAddress, GuestMemory, MemoryRegion, Vm};

const MIB: u64 = 1 << 20;
const BASE: GuestAddress = GuestAddress(0x10_0000);

fn region(len: u64) -> RegionBuilder {
    MemoryRegion::builder(BASE, len)
}

/// A guest's memory that is `region` alone.
fn memory(region: &MemoryRegion) -> GuestMemory {
    let memory = GuestMemory::new();
    memory.insert(Arc::new(region.clone())).unwrap();
    memory
}

/// What the kernel says of the mapping that `region` is in: the header line and one line a field.
fn smaps(region: &MemoryRegion) -> Vec<String> {
    let address = region.host_address() as u64;
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let range = |line: &str| {
        let (first, end) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(first, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    let mut lines = text.lines().skip_while(|line| !range(line).is_some_and(|r| r.contains(&address)));
    let header = lines.next().unwrap().to_owned();
    [header].into_iter().chain(lines.take_while(|line| range(line).is_none()).map(str::to_owned)).collect()
}

fn field(smaps: &[String], name: &str) -> String {
    smaps.iter().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned()
}

fn has_flag(region: &MemoryRegion, flag: &str) -> bool {
    field(&smaps(region), "VmFlags:").split(' ').any(|f| f == flag)
}

/// How many of the region's pages from page number `first` are in memory (proc(5), pagemap).
fn resident(region: &MemoryRegion, first: u64, pages: usize) -> usize {
    const PRESENT: u64 = 1 << 63;
    let mut entries = vec![0; pages * 8];
    let page = region.host_address() as u64 / PAGE_SIZE + first;
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, page * 8).unwrap();
    entries.chunks(8).filter(|e| u64::from_le_bytes((*e).try_into().unwrap()) & PRESENT != 0).count()
}

fn file_of(dir: &Path, len: u64) -> File {
    let path = dir.join("image");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(len).unwrap();
    file
}

fn file_backing(file: &File, offset: u64, shared: bool) -> Backing {
    Backing::File { file: Arc::new(file.try_clone().unwrap()), offset, shared }
}

/// The text of an error, after a look at its kind.
fn refused(settings: RegionBuilder, kind: fn(&MemoryError) -> bool) -> String {
    let error = settings.build().unwrap_err();
    assert!(kind(&error), "{error:?}");
    error.to_string()
}

#[track_caller]
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

#[test]
fn anonymous_memory_is_private_and_zero() {
    let region = region(MIB).build().unwrap();
    let mut bytes = [1; 64];
    memory(&region).read(GuestAddress(BASE.0 + MIB - 64), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 64]);
    assert!(region.file().is_none());
    let header = &smaps(&region)[0];
    assert!(header.contains(" rw-p ") && header.contains(" 00:00 0"), "{header}");
}

#[test]
fn a_memfd_is_shared_through_its_descriptor() {
    let region = region(MIB).backing(Backing::Memfd).build().unwrap();
    let (file, offset) = region.file().unwrap();
    assert_eq!((file.metadata().unwrap().len(), offset), (MIB, 0));
    memory(&region).write(GuestAddress(BASE.0 + 0x5000), b"from the guest").unwrap();
    let mut bytes = [0; 14];
    file.read_exact_at(&mut bytes, 0x5000).unwrap();
    assert_eq!(&bytes, b"from the guest");
    file.write_all_at(b"from elsewhere", 0x5000).unwrap();
    memory(&region).read(GuestAddress(BASE.0 + 0x5000), &mut bytes).unwrap();
    assert_eq!(&bytes, b"from elsewhere");
    assert!(smaps(&region)[0].contains(" rw-s "));
}

#[test]
fn a_shared_file_gets_the_writes_and_a_private_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let file = file_of(dir.path(), 4 * PAGE_SIZE);
    file.write_all_at(b"second page", PAGE_SIZE).unwrap();
    for (shared, after) in [(false, b"second page"), (true, b"changed him")] {
        let region = region(2 * PAGE_SIZE).backing(file_backing(&file, PAGE_SIZE, shared)).build().unwrap();
        assert_eq!(region.file().unwrap().1, PAGE_SIZE);
        let memory = memory(&region);
        let mut bytes = [0; 11];
        memory.read(BASE, &mut bytes).unwrap();
        assert_eq!(&bytes, b"second page", "from the offset");
        memory.write(BASE, b"changed him").unwrap();
        memory.read(BASE, &mut bytes).unwrap();
        assert_eq!(&bytes, b"changed him");
        file.read_exact_at(&mut bytes, PAGE_SIZE).unwrap();
        assert_eq!(&bytes, after, "shared: {shared}");
    }
}

#[test]
fn files_need_the_access_that_the_region_does() {
    let dir = tempfile::tempdir().unwrap();
    file_of(dir.path(), PAGE_SIZE).write_all_at(b"rom", 0).unwrap();
    let read_only = File::open(dir.path().join("image")).unwrap();
    let of = |shared| region(PAGE_SIZE).backing(file_backing(&read_only, 0, shared));
    // Copy-on-write needs no right to write, nor does a region that nobody writes.
    memory(&of(false).build().unwrap()).write(BASE, b"ram").unwrap();
    let rom = of(true).read_only().build().unwrap();
    let mut bytes = [0; 3];
    memory(&rom).read(BASE, &mut bytes).unwrap();
    assert_eq!(&bytes, b"rom");
    assert!(matches!(rom.fill(0, b"no"), Err(MemoryError::ReadOnly { .. })));
    let text = refused(of(true), |e| matches!(e, MemoryError::Host { .. }));
    says(&text, &["file-backed", "open the file for reading and writing"]);
    let text = refused(of(false).backing(file_backing(&read_only, PAGE_SIZE, false)), |e| {
        matches!(e, MemoryError::FileTooShort { offset: 4096, available: 0, needed: 4096 })
    });
    says(&text, &["has 0x0 bytes from offset 0x1000", "needs 0x1000", "extend the file"]);
    let text = refused(of(false).backing(file_backing(&read_only, 7, false)), |e| {
        matches!(e, MemoryError::Misaligned { .. })
    });
    says(&text, &["file offset 0x7", "0x1000"]);
}

#[test]
fn read_only_memory_takes_its_contents_and_no_writes() {
    let rom = region(PAGE_SIZE).read_only().build().unwrap();
    rom.fill(0x10, b"contents").unwrap();
    let memory = memory(&rom);
    let mut bytes = [0; 8];
    memory.read(GuestAddress(BASE.0 + 0x10), &mut bytes).unwrap();
    assert_eq!(&bytes, b"contents");
    let error = memory.write(GuestAddress(BASE.0 + 0x10), b"changed!").unwrap_err();
    assert!(matches!(error, MemoryError::ReadOnly { .. }));
    says(&error.to_string(), &["0x8 bytes at 0x100010", "[0x100000..=0x100fff]"]);
    // A device's write by the snapshot, as virtqueues do it.
    use vm_memory::Bytes;
    assert!(memory.snapshot().write_slice(b"changed!", GuestAddress(BASE.0 + 0x10)).is_err());
    memory.read(GuestAddress(BASE.0 + 0x10), &mut bytes).unwrap();
    assert_eq!(&bytes, b"contents");
}

#[test]
fn transparent_huge_pages_are_asked_for_or_declined() {
    if !Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        println!("skipped: this kernel has no transparent huge pages");
        return;
    }
    let flags = |huge| {
        let region = region(4 * MIB).huge_pages(huge).build().unwrap();
        ["hg", "nh"].map(|flag| has_flag(&region, flag))
    };
    assert_eq!(flags(HugePages::Default), [false, false]);
    assert_eq!(flags(HugePages::Transparent), [true, false]);
    assert_eq!(flags(HugePages::Never), [false, true]);
}

/// KVM maps nothing by huge pages where guest and host addresses differ modulo their size.
#[test]
fn guest_and_host_addresses_are_equal_modulo_huge_pages() {
    let dir = tempfile::tempdir().unwrap();
    let file = file_of(dir.path(), 8 * MIB);
    for base in [0, MIB, 0x1f_f000, 1 << 32] {
        for backing in [
            Backing::Anonymous,
            Backing::Memfd,
            file_backing(&file, 0, true),
            file_backing(&file, PAGE_SIZE, false),
        ] {
            let settings = MemoryRegion::builder(GuestAddress(base), 6 * MIB).backing(backing);
            let region = settings.build().unwrap();
            let address = region.host_address() as u64;
            assert_eq!(address % (2 * MIB), base % (2 * MIB), "{region:?}");
            // All of it is there, and nothing behind it is ours any more.
            memory(&region).write(GuestAddress(base + 6 * MIB - 4), b"last").unwrap();
            drop(region);
        }
    }
}

#[test]
fn a_dropped_region_leaves_no_mapping() {
    let region = region(8 * MIB).backing(Backing::Memfd).track_dirty().build().unwrap();
    // The inode tells this one from other tests' memory.
    let inode = format!(" {} ", region.file().unwrap().0.metadata().unwrap().ino());
    let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains(&inode);
    let clone = region.clone();
    drop(region);
    assert!(mapped(), "a clone keeps it");
    drop(clone);
    assert!(!mapped());
}

#[test]
fn reserved_huge_pages_are_used_or_refused_with_advice() {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free = free.ok().and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0);
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let settings = region(2 * MIB).backing(backing).huge_pages(HugePages::Size2M).prefault();
        if free == 0 {
            println!("no reserved huge pages here: only the refusal is tested");
            says(&refused(settings, |e| matches!(e, MemoryError::Host { .. })), &["nr_hugepages"]);
            continue;
        }
        let region = settings.build().unwrap();
        memory(&region).write(BASE, &[1]).unwrap();
        let smaps = smaps(&region);
        assert_eq!(field(&smaps, "KernelPageSize:"), "2048 kB");
        assert!(has_flag(&region, "ht"));
    }
    let half =
        |huge, len| refused(region(len).huge_pages(huge), |e| matches!(e, MemoryError::Misaligned { .. }));
    says(&half(HugePages::Size2M, 3 * MIB), &["length 0x300000", "0x200000 bytes", "0x400000"]);
    says(&half(HugePages::Size1G, 512 * MIB), &["length 0x20000000", "0x40000000 bytes"]);
    let dir = tempfile::tempdir().unwrap();
    let file = file_backing(&file_of(dir.path(), 2 * MIB), 0, true);
    let settings = region(2 * MIB).huge_pages(HugePages::Size2M).backing(file);
    says(&refused(settings, |e| matches!(e, MemoryError::Unsupported { .. })), &["hugetlbfs"]);
}

#[test]
fn mergeable_memory_is_registered_with_the_kernel() {
    if !Path::new("/sys/kernel/mm/ksm").exists() {
        says(&refused(region(MIB).mergeable(), |e| matches!(e, MemoryError::Host { .. })), &["no KSM"]);
        return;
    }
    assert!(has_flag(&region(MIB).mergeable().build().unwrap(), "mg"));
    assert!(!has_flag(&region(MIB).build().unwrap(), "mg"));
    // The kernel accepts the advice for these, and does nothing.
    for settings in [
        region(MIB).backing(Backing::Memfd).mergeable(),
        region(2 * MIB).huge_pages(HugePages::Size2M).mergeable(),
    ] {
        says(&refused(settings, |e| matches!(e, MemoryError::Unsupported { .. })), &["Backing::Anonymous"]);
    }
}

#[test]
fn numa_policies_hold_for_the_region_and_name_the_nodes_there_are() {
    if !Path::new("/proc/self/numa_maps").exists() {
        println!("skipped: this kernel has no NUMA policies");
        return;
    }
    let policy = |numa| {
        let region = region(MIB).numa(numa).build().unwrap();
        let start = format!("{:08x} ", region.host_address() as u64);
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let line = maps.lines().find_map(|line| line.strip_prefix(&start).map(str::to_owned)).unwrap();
        line.split(' ').next().unwrap().to_owned()
    };
    assert_eq!(policy(NumaPolicy::Bind(vec![0])), "bind:0");
    assert_eq!(policy(NumaPolicy::Interleave(vec![0])), "interleave:0");
    assert_eq!(policy(NumaPolicy::Preferred(0)), "prefer:0");
    for nodes in [vec![], vec![777], vec![5000]] {
        let text = refused(region(MIB).numa(NumaPolicy::Bind(nodes.clone())), |e| {
            matches!(e, MemoryError::NumaNodes { .. })
        });
        says(&text, &[&format!("{nodes:?}"), "memory on nodes 0"]);
    }
}

#[test]
fn writes_by_the_host_are_recorded_where_asked_for() {
    let tracked = region(64 * PAGE_SIZE).track_dirty().build().unwrap();
    let memory = memory(&tracked);
    memory.write(GuestAddress(BASE.0 + 3 * PAGE_SIZE - 1), &[1, 2]).unwrap();
    memory.read(GuestAddress(BASE.0 + 9 * PAGE_SIZE), &mut [0; 8]).unwrap();
    let dirty = tracked.take_host_dirty().unwrap();
    assert_eq!(dirty.dirty_offsets().collect::<Vec<_>>(), [2 * PAGE_SIZE, 3 * PAGE_SIZE]);
    assert_eq!(tracked.take_host_dirty().unwrap().count(), 0, "told once");
    let untracked = region(MIB).build().unwrap();
    assert!(!untracked.tracks_dirty() && untracked.take_host_dirty().is_none());
}

#[test]
fn prefaulted_memory_is_there_and_other_memory_is_not() {
    const PAGES: usize = 2048;
    let count = |settings: RegionBuilder| resident(&settings.build().unwrap(), 0, PAGES);
    assert_eq!(count(region(PAGES as u64 * PAGE_SIZE).prefault()), PAGES);
    assert_eq!(count(region(PAGES as u64 * PAGE_SIZE)), 0);
    assert_eq!(count(region(PAGES as u64 * PAGE_SIZE).backing(Backing::Memfd).prefault()), PAGES);
}

#[test]
fn a_tebibyte_costs_the_pages_that_are_touched() {
    const TIB: u64 = 1 << 40;
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let region = MemoryRegion::builder(GuestAddress(1 << 32), TIB)
            .backing(backing)
            .huge_pages(HugePages::Never)
            .build()
            .unwrap();
        let memory = memory(&region);
        let last = GuestAddress((1 << 32) + TIB - 8);
        memory.write(GuestAddress(1 << 32), b"firstly,").unwrap();
        memory.write(last, b"and last").unwrap();
        assert_eq!(memory.load::<[u8; 8]>(last).unwrap(), *b"and last");
        assert_eq!(memory.load::<[u8; 8]>(GuestAddress(1 << 32)).unwrap(), *b"firstly,");
        assert_eq!(memory.total_bytes(), TIB);
        let pages = TIB / PAGE_SIZE;
        assert_eq!([0, pages / 2, pages - 512].map(|first| resident(&region, first, 512)), [1, 0, 1]);
        let rss = field(&smaps(&region), "Rss:");
        let kib: u64 = rss.trim_end_matches(" kB").parse().unwrap();
        // Other tests' memory may be part of the same mapping.
        assert!((8..65536).contains(&kib), "{rss}");
    }
}

#[test]
fn impossible_regions_are_refused_by_value() {
    let at = |base, len| MemoryRegion::builder(GuestAddress(base), len);
    let misaligned = |e: &MemoryError| matches!(e, MemoryError::Misaligned { align: 4096, .. });
    says(&refused(at(0x1001, 0x1000), misaligned), &["base 0x1001", "0x1000 bytes", "0x1000 and 0x2000"]);
    says(&refused(at(0, 0x1fff), misaligned), &["length 0x1fff"]);
    says(
        &refused(at(0x5000, 0), |e| matches!(e, MemoryError::Empty { .. })),
        &["0x5000", "at least one page"],
    );
    for (base, len) in
        [(1 << 52, 0x1000), ((1 << 52) - 0x1000, 0x2000), (u64::MAX - 0xfff, 0x1000), (0x1000, 1 << 63)]
    {
        let text = refused(at(base, len), |e| matches!(e, MemoryError::Overflow { bits: 52, .. }));
        says(&text, &[&format!("{base:#x}"), &format!("{len:#x}"), "52-bit"]);
    }
    // More than any process has addresses for.
    let text = refused(at(0, 1 << 50), |e| matches!(e, MemoryError::Host { .. }));
    says(&text, &["map 0x4000000000000 bytes of anonymous memory", "ask for less"]);
}

#[test]
fn accesses_and_changes_name_what_is_in_the_way() {
    let memory = GuestMemory::new();
    let add = |base, len| memory.insert(Arc::new(MemoryRegion::anonymous(GuestAddress(base), len).unwrap()));
    add(0, 0x3000).unwrap();
    add(0x3000, 0x1000).unwrap();
    add(0x8000, 0x1000).unwrap();
    says(&add(0x2000, 0x8000).unwrap_err().to_string(), &["[0x2000..=0x9fff]", "[0x0..=0x2fff]"]);
    assert_eq!(memory.ranges().len(), 3);
    // Over the seam of two regions.
    memory.write(GuestAddress(0x2ff0), &[7; 0x20]).unwrap();
    assert_eq!(memory.load::<[u8; 0x20]>(GuestAddress(0x2ff0)).unwrap(), [7; 0x20]);
    let error = memory.write(GuestAddress(0x3ff0), &[9; 0x20]).unwrap_err();
    says(&error.to_string(), &["0x20 bytes at 0x3ff0", "ends at 0x4000"]);
    assert_eq!(memory.load::<u8>(GuestAddress(0x3ff0)).unwrap(), 0, "nothing of it is written");
    assert!(memory.read(GuestAddress(u64::MAX - 3), &mut [0; 8]).is_err());
    assert!(memory.zero(GuestAddress(0x8000), u64::MAX).is_err());
    let text = memory.remove(GuestAddress(0x1000)).unwrap_err().to_string();
    says(&text, &["0x1000", "0x0", "0x3000", "0x8000"]);
    // What is removed lives on for who holds it.
    let snapshot = memory.snapshot();
    memory.remove(GuestAddress(0x8000)).unwrap();
    assert!(!memory.contains(GuestAddress(0x8000), 1));
    assert!(snapshot.find(GuestAddress(0x8fff)).is_some());
}

struct Nothing;

impl BusDevice for Nothing {
    fn read(&mut self, _: u64, _: &mut [u8]) {}
    fn write(&mut self, _: u64, _: &[u8]) {}
}

#[test]
fn a_vm_runs_out_of_slots_and_keeps_memory_and_devices_apart() {
    let vm = Vm::bare_on(Arc::new(NoCpu), &Default::default()).unwrap();
    let map = |base| vm.map(MemoryRegion::anonymous(GuestAddress(base), PAGE_SIZE).unwrap());
    vm.mmio().insert(0x9800, 0x100, Arc::new(Mutex::new(Nothing))).unwrap();
    let error = map(0x9000).unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error}");
    says(&error.to_string(), &["[0x9000..=0x9fff]", "[0x9800..=0x98ff]"]);
    for base in 0..no_cpu::SLOTS {
        map(u64::from(base) * PAGE_SIZE).unwrap();
    }
    let error = map(0x8000).unwrap_err();
    assert!(matches!(error, Error::Memory(MemoryError::NoSlots { .. })), "{error}");
    says(&error.to_string(), &["[0x8000..=0x8fff]", "all 3 memory slots", "no-cpu", "unmap a region"]);
    // A slot that is given back is used again.
    vm.unmap(GuestAddress(0x1000)).unwrap();
    map(0x8000).unwrap();
    says(&map(0x8000).unwrap_err().to_string(), &["slots"]);
}

#[test]
fn memory_that_the_cpu_cannot_address_is_refused() {
    let build = |bytes| {
        let image = Raw::new(vec![0xf4], RawMode::Real16);
        Vm::builder().backend(Arc::new(NoCpu)).irqchip(false).memory(bytes).boot(image).build().unwrap_err()
    };
    says(&build(1 << 39).to_string(), &["0x7f40000000 bytes at 0x100000000", "39-bit"]);
    // What it can is refused for another reason: there is no CPU.
    assert!(matches!(build((1 << 39) - (1 << 30)), Error::Unsupported { .. }));
}

#[test]
fn ram_is_split_round_the_hole_below_4_gib() {
    const GIB: u64 = 1 << 30;
    let backend = match vmcore::kvm::Kvm::open() {
        Ok(kvm) => Arc::new(kvm),
        Err(reason) => return println!("skipped: {reason}"),
    };
    for (bytes, expected) in [
        (3 * GIB, vec![GpaRange { base: 0, len: 3 * GIB }]),
        (6 * GIB, vec![GpaRange { base: 0, len: 3 * GIB }, GpaRange { base: 4 * GIB, len: 3 * GIB }]),
    ] {
        let image = Raw::new(vec![0xf4], RawMode::Real16);
        let vm = Vm::builder().backend(backend.clone()).memory(bytes).boot(image).build().unwrap();
        assert_eq!(vm.memory().ranges(), expected);
        assert_eq!(vm.memory().total_bytes(), bytes);
        let error = vm.memory().write(GuestAddress(3 * GIB - 4), &[0; 8]).unwrap_err();
        says(&error.to_string(), &["0xbffffffc", "ends at 0xc0000000"]);
    }
}

/// Writes `byte` to every page of 8, and discards pages 2 to 5 with a bit of those around them.
fn discarded(region: &MemoryRegion, byte: u8) -> (u64, Vec<u8>) {
    let memory = memory(region);
    (0..8).for_each(|page| memory.write(GuestAddress(BASE.0 + page * PAGE_SIZE), &[byte; 9]).unwrap());
    let returned = region.discard(2 * PAGE_SIZE - 100, 4 * PAGE_SIZE + 200).unwrap();
    let first = |page: u64| memory.load::<u8>(GuestAddress(BASE.0 + page * PAGE_SIZE)).unwrap();
    (returned, (0..8).map(first).collect())
}

#[test]
fn discarded_pages_go_back_to_the_host() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 * PAGE_SIZE).unwrap();
    file.write_all_at(&[3; 8 * 4096], 0).unwrap();
    let file = Arc::new(file);
    let in_file = |shared| Backing::File { file: file.clone(), offset: 0, shared };
    for (backing, after, zero) in [
        (Backing::Anonymous, [7, 7, 0, 0, 0, 0, 7, 7], true),
        (Backing::Memfd, [7, 7, 0, 0, 0, 0, 7, 7], true),
        // What the file has, not what was written over it.
        (in_file(false), [7, 7, 3, 3, 3, 3, 7, 7], false),
    ] {
        let region = region(8 * PAGE_SIZE).backing(backing.clone()).build().unwrap();
        assert_eq!(region.discards_to_zero(), zero);
        let memory = memory(&region);
        (0..8).for_each(|page| memory.write(GuestAddress(BASE.0 + page * PAGE_SIZE), &[7]).unwrap());
        assert_eq!(resident(&region, 0, 8), 8, "{backing:?}");
        assert_eq!(region.discard(2 * PAGE_SIZE, 4 * PAGE_SIZE).unwrap(), 4 * PAGE_SIZE);
        assert_eq!(resident(&region, 0, 8), 4, "{backing:?}");
        if let (Backing::Memfd, Some((memfd, _))) = (&backing, region.file()) {
            assert_eq!(memfd.metadata().unwrap().blocks() * 512, 4 * PAGE_SIZE);
        }
        assert_eq!(discarded(&region, 7), (4 * PAGE_SIZE, after.to_vec()), "{backing:?}");
    }
    // Others see a shared file.
    let shared = region(8 * PAGE_SIZE).backing(in_file(true)).build().unwrap();
    assert_eq!(discarded(&shared, 9), (0, vec![9; 8]));
    let rom = region(8 * PAGE_SIZE).read_only().build().unwrap();
    assert_eq!(rom.discard(0, 8 * PAGE_SIZE).unwrap(), 0);
    for (offset, len) in [(0, 9 * PAGE_SIZE), (8 * PAGE_SIZE, 1), (u64::MAX, 2)] {
        assert!(matches!(shared.discard(offset, len), Err(MemoryError::NotMapped { .. })), "{offset} {len}");
    }
    assert_eq!(region(PAGE_SIZE).build().unwrap().discard(1, PAGE_SIZE - 1).unwrap(), 0, "half a page");
}

#[test]
fn pinned_pages_stay_and_discarded_ones_are_written_ones() {
    let region = region(8 * PAGE_SIZE).track_dirty().build().unwrap();
    let pins = [region.pin(), region.clone().pin()];
    assert_eq!(discarded(&region, 1), (0, vec![1; 8]));
    drop(pins);
    region.take_host_dirty();
    assert_eq!(region.discard(PAGE_SIZE, 2 * PAGE_SIZE).unwrap(), 2 * PAGE_SIZE);
    let dirty = region.take_host_dirty().unwrap();
    assert_eq!(dirty.dirty_offsets().collect::<Vec<_>>(), [PAGE_SIZE, 2 * PAGE_SIZE]);
}
