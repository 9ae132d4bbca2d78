//! Messages about what a guest does, which must not fill the host's log.

use std::fmt::Arguments;
use std::sync::atomic::{AtomicU32, Ordering};

/// Most messages that one guest device causes, over all its resets.
const MOST: u32 = 16;

/// Warns in the log, but not without end.
#[derive(Debug, Default)]
pub(crate) struct Complaints(AtomicU32);

impl Complaints {
    /// Says `what` about `who`.
    pub(crate) fn warn(&self, who: &str, what: Arguments<'_>) {
        if let Some(last) = self.next() {
            log::warn!("{who}: {what}{}", if last { " (no more messages of this device)" } else { "" });
        }
    }

    /// Whether one more message is in order, and the last.
    fn next(&self) -> Option<bool> {
        let count = |said| (said < MOST).then_some(said + 1);
        let said = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count).ok()?;
        Some(said + 1 == MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_to_an_end() {
        let complaints = Complaints::default();
        let said = (0..1000).filter_map(|_| complaints.next()).collect::<Vec<_>>();
        assert_eq!(said.iter().position(|&last| last), Some(15));
        assert_eq!(said.len(), 16);
    }
}
