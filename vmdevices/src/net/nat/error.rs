//! Why there is no NAT.

use std::io;
use std::net::SocketAddr;

use super::Protocol;

/// Why a [`Nat`](super::Nat) or a part of it cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NatError {
    /// The host refused something that every process may have.
    #[error("{op} failed: {source}; raise the limit of open files (ulimit -n) if it is reached")]
    Host {
        /// The call.
        op: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// A port of the host cannot be listened on.
    #[error(
        "cannot listen on {protocol} {bind}: {source}; take a port that is free (and above 1023 without privileges) and an address of this host"
    )]
    Bind {
        /// The protocol.
        protocol: Protocol,
        /// The address and port.
        bind: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// Something written does not mean anything here.
    #[error("{value:?} is not {what}: {fix}")]
    Text {
        /// What it should be.
        what: &'static str,
        /// What it was.
        value: String,
        /// What would do.
        fix: &'static str,
    },
    /// A setting that cannot be.
    #[error("{what} cannot be {value}: {fix}")]
    Setting {
        /// The setting.
        what: &'static str,
        /// What it was to be.
        value: String,
        /// What would do.
        fix: &'static str,
    },
}

impl NatError {
    /// Its code, as [`vmcore::Error::code`] has it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Host { .. } => "nat.host",
            Self::Bind { .. } => "nat.bind",
            Self::Text { .. } => "nat.text",
            Self::Setting { .. } => "nat.setting",
        }
    }

    /// What to do about it: the part of the text that says so.
    pub fn fix(&self) -> &str {
        match self {
            Self::Host { .. } => "raise the limit of open files (ulimit -n) if it is reached",
            Self::Bind { .. } => {
                "take a port that is free (and above 1023 without privileges) and an address of this host"
            }
            Self::Text { fix, .. } | Self::Setting { fix, .. } => fix,
        }
    }

    pub(super) fn text(what: &'static str, value: String, fix: &'static str) -> Self {
        Self::Text { what, value, fix }
    }
}

impl From<NatError> for vmcore::Error {
    fn from(error: NatError) -> Self {
        let code = error.code();
        let fix = error.fix().to_owned();
        vmcore::Error::device("NAT", error).with_code(code).with_fix(Some(fix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_is_the_end_of_the_text_and_a_part_of_the_engines_error() {
        let source = || io::Error::from_raw_os_error(libc::EMFILE);
        let bind = SocketAddr::from(([127, 0, 0, 1], 80));
        for error in [
            NatError::Host { op: "epoll_create", source: source() },
            NatError::Bind { protocol: Protocol::Tcp, bind, source: source() },
            NatError::text("a port", "x".into(), "give a number"),
            NatError::Setting { what: "the MTU", value: "1".into(), fix: "give more" },
        ] {
            let (text, fix) = (error.to_string(), error.fix().to_owned());
            assert!(text.ends_with(&fix), "{text}: {fix}");
            let code = error.code();
            let error = vmcore::Error::from(error);
            assert_eq!((error.fix(), error.code()), (Some(fix.as_str()), code));
        }
    }
}
