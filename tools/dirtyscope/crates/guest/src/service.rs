// SPDX-License-Identifier: GPL-2.0-only

//! The background process, and how one speaks to it: a Unix socket with a name that no file has, so
//! that nothing stays of it, whatever ends it. A request is a line; what comes back is a line with the
//! exit code, and text.

use crate::workload::Workload;
use anyhow::{Context as _, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::sockopt::socket_peercred,
};
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

const NAME: &str = "dirtyscope-guest";

/// After so long without an answer, or a request, nobody is there.
pub const LIMIT: Duration = Duration::from_secs(120);

fn address() -> Result<SocketAddr> {
    SocketAddr::from_abstract_name(NAME).with_context(|| format!("the socket {NAME}"))
}

/// What one may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Status,
    Check,
    Reset,
    Stop,
}

impl Request {
    const ALL: [Self; 4] = [Self::Status, Self::Check, Self::Reset, Self::Stop];

    fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Check => "check",
            Self::Reset => "reset",
            Self::Stop => "stop",
        }
    }

    /// Asks the background process. Returns whether all is well, and its words; none if there is no
    /// such process.
    pub fn ask(self) -> Result<Option<(bool, String)>> {
        let Ok(mut stream) = UnixStream::connect_addr(&address()?) else { return Ok(None) };
        stream.set_read_timeout(Some(LIMIT))?;
        writeln!(stream, "{}", self.name()).context("ask \"dirtyscope guest\"")?;
        let mut answer = String::new();
        let what = "the answer of \"dirtyscope guest\"; has it ended?";
        stream.read_to_string(&mut answer).context(what)?;
        let (code, text) = answer.split_once('\n').context(what)?;
        Ok(Some((code == "0", text.into())))
    }
}

/// The background process.
pub struct Service {
    listener: UnixListener,
    workload: Workload,
    /// What was wrong, if something was: all that device and CPU wrote stays as it is then.
    failure: Option<String>,
}

impl Service {
    /// The only one there is, with a device that has begun to write. The error says why it hasn't.
    pub fn new(start: impl FnOnce() -> Result<Workload>) -> Result<Self> {
        let Ok(listener) = UnixListener::bind_addr(&address()?) else {
            bail!("\"dirtyscope guest\" runs already: \"dirtyscope guest stop\" ends it")
        };
        Ok(Self { listener, workload: start()?, failure: None })
    }

    /// Goes on until it is told to stop, by request or by a signal.
    pub fn run(&mut self, stop: &AtomicBool) -> Result<()> {
        let mut next = Instant::now();
        while !stop.load(Relaxed) {
            if self.is_asked(next.saturating_duration_since(Instant::now()))? {
                // Whoever asks and goes away is no reason to end.
                let (stream, _) = self.listener.accept().context("accept")?;
                if self.serve(stream).is_ok_and(|request| request == Request::Stop) {
                    return Ok(());
                }
            }
            if Instant::now() >= next {
                if self.failure.is_none() {
                    let result = self.workload.write();
                    self.note(result);
                }
                next = Instant::now() + self.workload.period();
            }
        }
        self.workload.stop()
    }

    /// Whether somebody asks within this time.
    fn is_asked(&self, time: Duration) -> Result<bool> {
        let time = Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        match poll(&mut fds, Some(&time)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error).context("wait for requests"),
        }
    }

    /// Keeps what is wrong, and halts the device.
    fn note(&mut self, result: Result<()>) {
        let Err(error) = result else { return };
        let mut text = format!("{error:#}");
        if let Err(error) = self.workload.halt() {
            text += &format!("\nand the device can't be stopped: {error:#}");
        }
        self.failure.get_or_insert(text);
    }

    /// Answers one request.
    fn serve(&mut self, mut stream: UnixStream) -> Result<Request> {
        stream.set_read_timeout(Some(LIMIT))?;
        let peer = socket_peercred(&stream)?;
        if !peer.uid.is_root() {
            writeln!(stream, "1\nthis needs root")?;
            bail!("{peer:?} asks")
        }
        let mut line = String::new();
        BufReader::new(&stream).take(16).read_line(&mut line)?;
        let request = Request::ALL.into_iter().find(|request| request.name() == line.trim());
        let request = request.with_context(|| format!("no request: {line:?}"))?;
        if request != Request::Status && self.failure.is_none() {
            let result = match request {
                Request::Reset => self.workload.reset(),
                _ => self.workload.check(),
            };
            self.note(result);
        }
        if request == Request::Stop {
            let result = self.workload.stop();
            self.note(result);
        }
        match &self.failure {
            None => writeln!(stream, "0\n{}\nstate: all is as it must be", self.workload)?,
            Some(failure) => writeln!(
                stream,
                "1\n{}\nstate: failed, device and CPU write no more\n{failure}",
                self.workload
            )?,
        }
        Ok(request)
    }
}
