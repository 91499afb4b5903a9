// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result, sys};
use rustix::thread::gettid;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Signals that kill nobody, to the thread that made this, until it is dropped: as a timer's.
#[derive(Debug)]
pub struct Signals {
    stop: Arc<AtomicBool>,
    sender: Option<JoinHandle<()>>,
}

impl Signals {
    /// One signal each time so much has passed.
    pub fn every(pause: Duration) -> Result<Self> {
        sys::handle_signal().map_err(|e| Error::new("sigaction", e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (thread, stopped) = (gettid(), stop.clone());
        let sender = thread::spawn(move || {
            while !stopped.load(Relaxed) {
                sys::send_signal(thread);
                thread::sleep(pause);
            }
        });
        Ok(Self { stop, sender: Some(sender) })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let ended = self.sender.take().map(JoinHandle::join);
        debug_assert!(matches!(ended, Some(Ok(()))));
    }
}
