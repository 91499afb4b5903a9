// SPDX-License-Identifier: GPL-2.0-only

//! A machine with a guest, whose shell does what it is told.

use crate::qemu::or_skip;
use anyhow::{Context as _, Result, ensure};
use mdev_dma::sysfs::Mdev;
use qemu_client::{Monitor, Qemu};
use std::{
    cell::RefCell,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// A guest that is emulated by what is emulated takes its time, and QEMU with it.
pub const LIMIT: Duration = Duration::from_secs(240);

/// A guest that boots there takes longer than all else.
pub const BOOT_LIMIT: Duration = Duration::from_secs(900);

/// What tools/vm/guest-init says when the guest has booted.
const READY: &str = "ready";

/// What a machine calls the device.
const ID: &str = "dma";

/// How a machine with the device is to have it: the bus "socket" is in the arguments that come with the guest.
const DRIVER: &str = "vfio-pci";

/// The properties of the device.
fn properties(sysfs: &str) -> [(&str, &str); 5] {
    [
        ("id", ID),
        ("bus", "socket"),
        ("addr", "0x0"),
        ("sysfsdev", sysfs),
        ("enable-migration", "on"),
    ]
}

/// A machine with a guest.
pub struct GuestMachine {
    /// What failures call it.
    pub name: String,
    qemu: Qemu,
    shell: RefCell<BufReader<UnixStream>>,
    /// What the guest's kernel says.
    console: PathBuf,
}

impl GuestMachine {
    /// Starts one that waits for a machine to come: with the device, or without. `guest` is the
    /// directory with QEMU's arguments.
    pub fn start(
        program: &str,
        guest: &Path,
        directory: &Path,
        name: &str,
        mdev: Option<&Mdev>,
    ) -> Result<Self> {
        let path = guest.join("arguments");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mut arguments: Vec<String> = text.lines().map(Into::into).collect();
        if let Some(mdev) = mdev {
            let path = mdev.path().display().to_string();
            let properties = properties(&path).map(|(name, value)| format!("{name}={value}"));
            arguments.extend(["-device".into(), format!("{DRIVER},{}", properties.join(","))]);
        }
        arguments.extend(["-incoming", "defer"].map(Into::into));
        let console = directory.join(format!("{name}.console"));
        let log = directory.join(format!("{name}.log"));
        let started = Qemu::start_guest(program, &arguments, guest, &console, &log);
        let (qemu, shell) = or_skip(started).with_context(|| format!("{name} doesn't start"))?;
        shell.set_read_timeout(Some(LIMIT))?;
        let shell = RefCell::new(BufReader::new(shell));
        Ok(Self { name: name.into(), qemu, shell, console })
    }

    /// Plugs the device in.
    pub fn plug(&self, mdev: &Mdev) -> Result<()> {
        let path = mdev.path().display().to_string();
        Ok(self.monitor().add_device(DRIVER, &properties(&path))?)
    }

    /// Asks the guest to let go of the device.
    pub fn unplug(&self) -> Result<()> {
        Ok(self.monitor().remove_device(ID)?)
    }

    /// Whether the machine has the device.
    pub fn is_plugged(&self) -> Result<bool> {
        Ok(self.monitor().has_device(ID)?)
    }

    /// QEMU's own commands.
    pub fn monitor(&self) -> &Monitor {
        self.qemu.monitor()
    }

    /// Has the guest's shell run a line. Returns its exit status, and what it said.
    pub fn run(&self, line: &str) -> Result<(u8, String)> {
        let what = || format!("\"{line}\" in the guest of {}", self.name);
        self.tell(line)?;
        let mut text = String::new();
        loop {
            let answer = self.answer().with_context(what)?;
            if let Some(code) = answer.strip_prefix("exit ") {
                return Ok((code.parse().with_context(what)?, text));
            }
            text.push_str(&answer);
            text.push('\n');
        }
    }

    /// Has the guest's shell run a line that it doesn't come back from.
    pub fn tell(&self, line: &str) -> Result<()> {
        let what = || format!("\"{line}\" to the guest of {}", self.name);
        writeln!(self.shell.borrow_mut().get_mut(), "{line}").with_context(what)
    }

    /// Waits until the guest has booted.
    pub fn booted(&self) -> Result<()> {
        self.shell.borrow().get_ref().set_read_timeout(Some(BOOT_LIMIT))?;
        while self.answer().with_context(|| format!("{} boots", self.name))? != READY {}
        Ok(self.shell.borrow().get_ref().set_read_timeout(Some(LIMIT))?)
    }

    /// The next line of the guest's shell.
    fn answer(&self) -> Result<String> {
        let mut answer = String::new();
        let n = self.shell.borrow_mut().read_line(&mut answer)?;
        ensure!(n > 0, "QEMU has ended");
        Ok(answer.trim_end().into())
    }

    /// What the guest's kernel has said since the machine came here.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// What QEMU and the guest's kernel have said.
    pub fn log(&mut self) -> String {
        let (qemu, console) = (self.qemu.log(), self.console());
        format!("QEMU of {name} says:\n{qemu}\nits guest says:\n{console}\n", name = self.name)
    }
}
