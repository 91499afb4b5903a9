// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Monitor, Qtest, Result, error::LIMIT};
use rustix::io::{FdFlags, fcntl_setfd};
use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// A running QEMU. It is killed when this is dropped, and ends when this process does.
///
/// While one is started, no other thread may start a process: it would inherit the connections.
pub struct Qemu {
    child: Child,
    log: PathBuf,
    monitor: Monitor,
}

impl Qemu {
    /// Runs `program` without a guest, with `arguments`, which say what machine it is, and waits until
    /// its monitor answers. What QEMU says goes to `log`. Returns the machine as its CPU sees it, too.
    pub fn start(program: &str, arguments: &[String], log: &Path) -> Result<(Self, Qtest)> {
        let (qtest, end) = connection().map_err(|source| could_not(program, source))?;
        let mut command = Command::new(program);
        command.args(["-accel", "qtest", "-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(["-chardev", &socket("qtest", &end), "-qtest", "chardev:qtest"]);
        command.args(["-qtest-log", "/dev/null"]).args(arguments);
        Ok((Self::run(command, end, program, log)?, Qtest::new(qtest)))
    }

    /// Runs `program` with a guest: `arguments` say which, with names of files relative to `directory`.
    /// As [`Qemu::start`]. Returns the other end of its second serial line, too; the first goes to the
    /// file `console`.
    pub fn start_guest(
        program: &str,
        arguments: &[String],
        directory: &Path,
        console: &Path,
        log: &Path,
    ) -> Result<(Self, UnixStream)> {
        let (serial, end) = connection().map_err(|source| could_not(program, source))?;
        let mut command = Command::new(program);
        command.current_dir(directory).args(arguments);
        command.args(["-serial", &format!("file:{}", console.display())]);
        command.args(["-chardev", &socket("serial", &end), "-serial", "chardev:serial"]);
        Ok((Self::run(command, end, program, log)?, serial))
    }

    /// Runs a command that inherits `end`, and connects to its monitor.
    fn run(mut command: Command, end: UnixStream, program: &str, log: &Path) -> Result<Self> {
        let could_not = |source| could_not(program, source);
        let output = File::create(log).map_err(could_not)?;
        let (monitor, monitor_end) = connection().map_err(could_not)?;
        let child = command
            .args(["-run-with", "exit-with-parent=on"])
            .args(["-chardev", &socket("qmp", &monitor_end), "-qmp", "chardev:qmp"])
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(could_not)?)
            .stderr(output)
            .spawn()
            .map_err(could_not)?;
        // QEMU alone has its ends now: when it ends, we see it.
        drop((end, monitor_end));
        match Monitor::new(monitor) {
            Ok(monitor) => Ok(Self { child, log: log.into(), monitor }),
            Err(error) => Err(refused_to_start(child, log, error)),
        }
    }

    /// QEMU's own commands.
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Kills it, as if its host had died.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What QEMU has said, and how it ended if it has.
    pub fn log(&mut self) -> String {
        let mut text = fs::read_to_string(&self.log).unwrap_or_default();
        if let Ok(Some(status)) = self.child.try_wait() {
            text.push_str(&match status.signal() {
                Some(signal) => format!("(killed by signal {signal})"),
                None => format!("(ended, {status})"),
            });
        }
        text
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}

fn could_not(program: &str, source: io::Error) -> Error {
    Error::Start { program: program.into(), source }
}

/// A socket that a child inherits, as QEMU wants it said.
fn socket(name: &str, end: &UnixStream) -> String {
    format!("socket,id={name},fd={}", end.as_raw_fd())
}

/// A connection: our end, and the end for a child to inherit.
fn connection() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(LIMIT))?;
    ours.set_write_timeout(Some(LIMIT))?;
    fcntl_setfd(&theirs, FdFlags::empty())?;
    Ok((ours, theirs))
}

/// A QEMU that refuses to start says why on its standard error.
fn refused_to_start(mut child: Child, log: &Path, error: Error) -> Error {
    let _ = child.kill();
    let _ = child.wait();
    match fs::read_to_string(log) {
        Ok(text) if !text.trim().is_empty() => {
            Error::Refused { what: "start QEMU".into(), answer: text.trim().into() }
        }
        _ => error,
    }
}
