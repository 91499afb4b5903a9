// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result};
use rustix::io::Errno;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A PCI function, by its directory in sysfs (`Documentation/ABI/testing/sysfs-bus-pci`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciFunction {
    path: PathBuf,
}

impl PciFunction {
    /// The one with this directory, e.g. `/sys/bus/pci/devices/ADDRESS`.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its address: domain, bus, slot and function.
    pub fn address(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// What a file of its directory has, without the newline.
    pub fn read(&self, name: &str) -> Result<String> {
        let path = self.path.join(name);
        let text = fs::read_to_string(&path);
        let text = text.map_err(|e| failed(format!("read {}", path.display()), &e))?;
        Ok(text.trim_end().to_owned())
    }

    /// Writes to a file of its directory.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        write(&self.path.join(name), text)
    }

    /// The driver that it is bound to.
    pub fn driver(&self) -> Option<String> {
        let target = fs::read_link(self.path.join("driver")).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// Binds it to a driver, whatever it was bound to. Blocks while it is open.
    pub fn bind(&self, driver: &str) -> Result<()> {
        if self.driver().as_deref() == Some(driver) {
            return Ok(());
        }
        if !Self::has_driver(driver) {
            let what = format!("there is no PCI driver {driver}: modprobe {driver}");
            return Err(Error::other(what));
        }
        self.unbind()?;
        self.write("driver_override", driver)?;
        write(Path::new("/sys/bus/pci/drivers_probe"), &self.address())?;
        match self.driver() {
            Some(bound) if bound == driver => Ok(()),
            other => {
                let path = self.path.display();
                Err(Error::other(format!("{path} is bound to {other:?}, not to {driver}")))
            }
        }
    }

    /// Leaves it without a driver.
    pub fn unbind(&self) -> Result<()> {
        if self.driver().is_some() {
            self.write("driver/unbind", &self.address())?;
        }
        self.write("driver_override", "\n")
    }

    /// Whether the kernel has a PCI driver of this name, loaded or built in.
    pub fn has_driver(name: &str) -> bool {
        Path::new("/sys/bus/pci/drivers").join(name).exists()
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    let written = fs::write(path, text);
    written.map_err(|e| failed(format!("write {text:?} to {}", path.display()), &e))
}

fn failed(what: String, error: &io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    let hint = if errno == Errno::ACCESS { "this needs root" } else { "" };
    Error::new(what, errno).hint(hint)
}
