//! The fuzz targets of image formats on real images, and on those changed here and there.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "tests, and a module of a fuzz crate of its own workspace"
)]

#[path = "../fuzz/src/images.rs"]
mod fuzz;
#[path = "images/mod.rs"]
mod tool;

use fuzz::{image, seed};
use tool::{create, qemu_img};
use vmdevices::block::Format;

/// Every format, and options of `qemu-img` for the smallest images of its kinds.
const KINDS: [(Format, &str); 8] = [
    (Format::Qcow2, "-o cluster_size=512"),
    (Format::Qcow2, "-c -o cluster_size=4096"),
    (Format::Qcow2, "-o cluster_size=4096,refcount_bits=1"),
    (Format::Vmdk, "-o subformat=monolithicSparse"),
    (Format::Vmdk, "-o subformat=streamOptimized"),
    (Format::Vhdx, "-o subformat=dynamic,block_size=1M"),
    (Format::Vdi, ""),
    (Format::Vdi, "-o static=on"),
];

/// Inputs that describe real images. With `VMCORE_FUZZ_CORPUS=fuzz/corpus` they are put there too.
fn seeds() -> Option<Vec<(Format, Vec<u8>)>> {
    let directory = tool::directory()?;
    let source = directory.path().join("source");
    let mut content = vec![0; 256 << 10];
    content[..3000].fill(0x5a);
    content[100_000..104_000].iter_mut().enumerate().for_each(|(n, byte)| *byte = n as u8);
    std::fs::write(&source, content).unwrap();
    let corpus = std::env::var_os("VMCORE_FUZZ_CORPUS").map(std::path::PathBuf::from);
    // With a backing file's name, which leads nowhere.
    let over = format!("backing_file={},backing_fmt=raw,cluster_size=512", source.display());
    let over = std::fs::read(create(directory.path(), "over", "qcow2", &over, "")).unwrap();
    assert!(!image(Format::Qcow2, &seed(&over)));
    let made = KINDS.iter().enumerate().map(|(n, (format, options))| {
        let path = directory.path().join(n.to_string());
        assert!(qemu_img(&format!(
            "convert -f raw -O {format} {options} {} {}",
            source.display(),
            path.display()
        )));
        let input = seed(&std::fs::read(path).unwrap());
        if let Some(corpus) = &corpus {
            let target = corpus.join(format!("image_{format}"));
            std::fs::create_dir_all(&target).unwrap();
            std::fs::write(target.join(format!("seed-{n}")), &input).unwrap();
        }
        (*format, input)
    });
    Some(made.collect())
}

/// What fuzzing with these began with, and what it found on the way there.
#[test]
fn the_seeds_of_the_fuzz_targets_do_no_harm() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for format in [Format::Qcow2, Format::Vmdk, Format::Vhdx, Format::Vdi] {
        let seeds = std::fs::read_dir(corpus.join(format!("image_{format}"))).unwrap();
        let opened = seeds.filter(|seed| {
            let path = seed.as_ref().unwrap().path();
            image(format, &std::fs::read(path).unwrap())
        });
        assert!(opened.count() > 0, "{format}");
    }
}

#[test]
fn real_images_are_opened_and_damaged_ones_do_no_harm() {
    let Some(seeds) = seeds() else { return };
    let mut state = 0_u64;
    let mut word = move || {
        // Weyl's sequence through a mixer (splitmix64): the same on every run.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) >> 20) as usize
    };
    for (format, input) in seeds {
        println!("{format}: {} bytes", input.len());
        assert!(image(format, &input), "{format}");
        for _ in 0..40 {
            let mut changed = input.clone();
            for _ in 0..1 + word() % 4 {
                let end = [700, changed.len().min(4096), changed.len()][word() % 3];
                let at = word() % end;
                changed[at] = word() as u8;
            }
            image(format, &changed);
        }
        assert!(!image(format, &input[..5]) && !image(format, &[]));
    }
}
