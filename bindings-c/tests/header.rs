//! vmcore.h is what cbindgen makes of the crate: `VMCORE_BLESS=1 cargo test -p vmcore-c --test header` makes it anew.

use std::path::Path;

#[test]
fn the_header_is_fresh() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(here.join("cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    cbindgen::Builder::new().with_crate(here).with_config(config).generate().unwrap().write(&mut made);
    let path = here.join("include/vmcore.h");
    if std::env::var_os("VMCORE_BLESS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let checked_in = std::fs::read(&path).unwrap();
    assert!(made == checked_in, "vmcore.h is stale: VMCORE_BLESS=1 cargo test -p vmcore-c --test header");
    let version = format!("#define VMCORE_VERSION \"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(
        String::from_utf8(made).unwrap().contains(&version),
        "cbindgen.toml has another version than the crate"
    );
}
