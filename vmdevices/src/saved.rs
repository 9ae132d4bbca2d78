//! How devices save their state: a version byte, then the state in postcard's encoding.

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmcore::{Error, Result};

/// The bytes of `state`.
pub(crate) fn save<T: Serialize>(what: &'static str, version: u8, state: &T) -> Result<Vec<u8>> {
    postcard::to_extend(state, vec![version]).map_err(|e| Error::device(what, e))
}

/// The state in `bytes`, which [`save`] made with the same version.
pub(crate) fn restore<T: DeserializeOwned>(what: &'static str, version: u8, bytes: &[u8]) -> Result<T> {
    let wrong = |found: String| Error::State { what, expected: format!("version {version}"), found };
    let (found, state) = bytes.split_first().ok_or_else(|| wrong("0 bytes".into()))?;
    if *found != version {
        return Err(wrong(format!("version {found}")));
    }
    match postcard::take_from_bytes(state) {
        Ok((state, [])) => Ok(state),
        Ok((_, rest)) => Err(wrong(format!("{} bytes too many", rest.len()))),
        Err(e) => Err(wrong(format!("{} bytes that are no such state ({e})", state.len()))),
    }
}
