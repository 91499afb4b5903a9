// SPDX-License-Identifier: GPL-2.0-only

use std::{io, time::Duration};

/// After so long without an answer, QEMU hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// Which one.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// Nothing came, or the connection has ended.
    #[error("{what}: {}", lost(source))]
    Lost {
        /// What was asked.
        what: String,
        /// What happened instead of an answer.
        source: io::Error,
    },
    /// QEMU refused.
    #[error("{what}: {answer}")]
    Refused {
        /// What was asked.
        what: String,
        /// What it said.
        answer: String,
    },
    /// The device in the machine isn't what it should be.
    #[error(transparent)]
    Device(#[from] mdev_dma::Error),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

fn lost(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("QEMU didn't answer within {} s", LIMIT.as_secs())
        }
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => "QEMU has ended".into(),
        _ => source.to_string(),
    }
}
