// SPDX-License-Identifier: GPL-2.0-only

//! The device as a PCI function of this machine, by sysfs.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use mdev_dma::{Error, MdevDma, RegisterAccess, Width, uapi};
use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};
use vfio_client::{Mmio, PciFunction};

const DEVICES: &str = "/sys/bus/pci/devices";

// PCI configuration space, as in `include/uapi/linux/pci_regs.h`.
const PCI_COMMAND: u64 = 0x04;
const PCI_COMMAND_MEMORY: u16 = 0x2;
const PCI_COMMAND_MASTER: u16 = 0x4;
const PCI_COMMAND_INTX_DISABLE: u16 = 0x400;

/// A driver of whose interrupts a process can be told.
pub const UIO: &str = "uio_pci_generic";

/// A PCI function with the device's ids.
pub struct Function(PciFunction);

impl Function {
    /// The one at `address`, or the only one there is.
    pub fn find(address: Option<&str>) -> Result<Self> {
        Self::find_in(Path::new(DEVICES), address)
    }

    fn find_in(devices: &Path, address: Option<&str>) -> Result<Self> {
        if let Some(address) = address {
            let path = devices.join(address);
            let what = format!("--device {address}: no PCI function {}", path.display());
            ensure!(path.is_dir(), "{what}; addresses are as in \"lspci -D\", e.g. 0000:00:04.0");
            let this = Self(PciFunction::new(path));
            ensure!(this.is_ours()?, "--device {address} is no {}", ids());
            return Ok(this);
        }
        let at = devices.display();
        let entries =
            fs::read_dir(devices).with_context(|| format!("{at}: has this machine PCI?"))?;
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| at.to_string())?;
            let this = Self(PciFunction::new(entry.path()));
            if this.is_ours()? {
                found.push(this);
            }
        }
        let what = format!("{at} has no {}: does the VMM give it to this machine?", ids());
        ensure!(!found.is_empty(), what);
        if found.len() > 1 {
            let mut addresses: Vec<_> = found.iter().map(Self::address).collect();
            addresses.sort_unstable();
            bail!(
                "there is more than one {}: say --device with one of {}",
                ids(),
                addresses.join(", ")
            );
        }
        Ok(found.remove(0))
    }

    /// Its address: domain, bus, slot and function.
    pub fn address(&self) -> String {
        self.0.address()
    }

    fn is_ours(&self) -> Result<bool> {
        let ids = (self.number("vendor")?, self.number("device")?);
        let ours = (uapi::RUST_MDEV_DMA_PCI_VENDOR_ID, uapi::RUST_MDEV_DMA_PCI_DEVICE_ID);
        Ok(ids == ours)
    }

    /// Fails if what the device takes for addresses isn't what the CPU does.
    pub fn refuse_iommu(&self) -> Result<()> {
        let group = self.0.path().join("iommu_group");
        if !group.exists() {
            return Ok(());
        }
        // A kernel before 5.11 has no such file, and doesn't say.
        let kind = fs::read_to_string(group.join("type")).unwrap_or_default();
        ensure!(
            kind.trim() == "identity",
            "this machine has an IOMMU in front of {}, so physical addresses, which are all that a \
             process can find out, aren't what the device needs: boot with iommu=pt, or without an IOMMU",
            self.address()
        );
        Ok(())
    }

    /// The driver that has it.
    pub fn driver(&self) -> Option<String> {
        self.0.driver()
    }

    /// Fails if a driver has it that would not expect us.
    pub fn refuse_driver(&self) -> Result<()> {
        match self.driver() {
            Some(driver) if driver != UIO => bail!(
                "the driver {driver} has {address}: echo {address} > {path}/driver/unbind",
                address = self.address(),
                path = self.0.path().display()
            ),
            _ => Ok(()),
        }
    }

    /// Gives it to [`UIO`], if it has no driver and that one is there.
    pub fn bind_uio(&self) -> Result<()> {
        if self.driver().is_none() && PciFunction::has_driver(UIO) {
            self.0.bind(UIO)?;
        }
        Ok(())
    }

    /// The file through which [`UIO`] tells of interrupts.
    pub fn uio(&self) -> Result<File> {
        let directory = self.0.path().join("uio");
        let what = || format!("{}", directory.display());
        let mut entries = fs::read_dir(&directory).with_context(what)?;
        let name = entries.next().with_context(what)??.file_name();
        let path = Path::new("/dev").join(name);
        let mut open = OpenOptions::new();
        open.read(true).write(true).open(&path).with_context(|| path.display().to_string())
    }

    /// Enables memory accesses and DMA, and maps its registers.
    pub fn open(&self) -> Result<MdevDma<Bar>> {
        // A driver has done so, and nobody else may then.
        if self.driver().is_none() {
            self.0.write("enable", "1")?;
        }
        self.change_command(PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 0)?;
        self.check_bar()?;
        let path = self.0.path().join("resource0");
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.with_context(|| path.display().to_string())?;
        let mmio = Mmio::of_file(&file, uapi::RUST_MDEV_DMA_BAR_SIZE as usize)
            .context("does the kernel's lockdown forbid it? See /sys/kernel/security/lockdown")?;
        let device = MdevDma::new(Bar(mmio));
        device.check().with_context(|| format!("BAR 0 of {}", self.address()))?;
        Ok(device)
    }

    /// Resets it as the kernel does for a driver that asks: with the means it has, and all that the kernel has
    /// set up in configuration space as it was before.
    pub fn reset(&self) -> Result<()> {
        let what = || format!("{}/reset, see reset_method there", self.0.path().display());
        self.0.write("reset", "1").with_context(what)
    }

    /// Fails if firmware or kernel gave BAR 0 no address.
    fn check_bar(&self) -> Result<()> {
        let resources = self.0.read("resource")?;
        let mut words = resources.split_whitespace();
        let mut word = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        let (start, end) = word()
            .zip(word())
            .with_context(|| anyhow!("{}/resource: {resources}", self.0.path().display()))?;
        ensure!(
            start != 0 && end - start + 1 == u64::from(uapi::RUST_MDEV_DMA_BAR_SIZE),
            "BAR 0 of {} is at {start:#x}-{end:#x}: firmware and kernel gave it no address of its own; \
             boot with pci=realloc",
            self.address()
        );
        Ok(())
    }

    /// Lets the function assert its interrupt again, which the driver keeps it from after each.
    pub fn unmask_interrupt(&self) -> Result<()> {
        self.change_command(0, PCI_COMMAND_INTX_DISABLE)
    }

    /// Sets and clears bits of the command register.
    fn change_command(&self, set: u16, clear: u16) -> Result<()> {
        let path = self.0.path().join("config");
        let what = || path.display().to_string();
        let file = OpenOptions::new().read(true).write(true).open(&path).with_context(what)?;
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, PCI_COMMAND).with_context(what)?;
        let command = (u16::from_le_bytes(bytes) | set) & !clear;
        file.write_all_at(&command.to_le_bytes(), PCI_COMMAND).with_context(what)
    }

    fn number(&self, name: &str) -> Result<u32> {
        let text = self.0.read(name)?;
        let digits = text.trim().trim_start_matches("0x");
        u32::from_str_radix(digits, 16)
            .with_context(|| format!("{}/{name}: {text:?}", self.0.path().display()))
    }
}

/// What to look for.
fn ids() -> String {
    let (vendor, device) = (uapi::RUST_MDEV_DMA_PCI_VENDOR_ID, uapi::RUST_MDEV_DMA_PCI_DEVICE_ID);
    format!("rust_mdev_dma device ({vendor:04x}:{device:04x})")
}

/// The registers.
pub struct Bar(Mmio);

impl RegisterAccess for Bar {
    type Error = Error;

    fn read(&self, register: u32, width: Width) -> mdev_dma::Result<u64> {
        Ok(self.0.read(register as usize, width.bytes()))
    }

    fn write(&self, register: u32, width: Width, value: u64) -> mdev_dma::Result<()> {
        self.0.write(register as usize, width.bytes(), value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    const BAR: &str = "0x00000000febd0000 0x00000000febd0fff 0x0000000000040200\n";

    /// Devices, by their addresses and device ids.
    fn devices(ids: &[(&str, &str)]) -> TempDir {
        let devices = tempfile::tempdir().unwrap();
        for (address, id) in ids {
            let path = devices.path().join(address);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("vendor"), "0x1234\n").unwrap();
            fs::write(path.join("device"), format!("{id}\n")).unwrap();
        }
        devices
    }

    /// Ours, and the devices that it is one of.
    fn ours() -> (TempDir, Function) {
        let devices = devices(&[("0000:00:04.0", "0x4d44")]);
        let function = Function::find_in(devices.path(), None).unwrap();
        (devices, function)
    }

    fn error<T>(result: Result<T>) -> String {
        format!("{:#}", result.err().unwrap())
    }

    #[test]
    fn the_only_one_is_found() {
        let devices = devices(&[("0000:00:03.0", "0x11e8"), ("0000:00:04.0", "0x4d44")]);
        let find = |address| Function::find_in(devices.path(), address);
        assert_eq!(find(None).unwrap().address(), "0000:00:04.0");
        assert_eq!(find(Some("0000:00:04.0")).unwrap().address(), "0000:00:04.0");
        assert!(
            error(find(Some("0000:00:03.0"))).contains("is no rust_mdev_dma device (1234:4d44)")
        );
        assert!(error(find(Some("00:04.0"))).contains("no PCI function"));
    }

    #[test]
    fn none_and_several_are_refused() {
        let none = devices(&[("0000:00:03.0", "0x11e8")]);
        assert!(error(Function::find_in(none.path(), None)).contains("does the VMM give it"));
        let both = devices(&[("0000:00:04.0", "0x4d44"), ("0000:00:05.0", "0x4d44")]);
        let said = error(Function::find_in(both.path(), None));
        assert!(said.ends_with("--device with one of 0000:00:04.0, 0000:00:05.0"), "{said}");
        let gone = both.path().join("nothing");
        assert!(error(Function::find_in(&gone, None)).contains("has this machine PCI?"));
    }

    #[test]
    fn an_iommu_that_translates_is_refused() {
        let (_devices, function) = ours();
        function.refuse_iommu().unwrap();
        let group = function.0.path().join("iommu_group");
        fs::create_dir(&group).unwrap();
        for (kind, is_fine) in [("identity\n", true), ("DMA-FQ\n", false), ("DMA\n", false)] {
            fs::write(group.join("type"), kind).unwrap();
            assert_eq!(function.refuse_iommu().is_ok(), is_fine, "{kind}");
        }
    }

    #[test]
    fn a_driver_that_would_not_expect_us_is_refused() {
        let (devices, function) = ours();
        function.refuse_driver().unwrap();
        for (driver, is_fine) in [(UIO, true), ("vfio-pci", false)] {
            let link = function.0.path().join("driver");
            let _ = fs::remove_file(&link);
            symlink(devices.path().join(driver), link).unwrap();
            assert_eq!(function.refuse_driver().is_ok(), is_fine, "{driver}");
        }
        assert!(error(function.refuse_driver()).contains("echo 0000:00:04.0 >"));
    }

    #[test]
    fn a_bar_without_an_address_is_refused() {
        let (_devices, function) = ours();
        let nowhere = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n";
        for (resource, is_fine) in [(BAR, true), (nowhere, false), ("", false)] {
            fs::write(function.0.path().join("resource"), resource).unwrap();
            assert_eq!(function.check_bar().is_ok(), is_fine, "{resource}");
        }
    }

    #[test]
    fn only_the_bits_meant_change_in_the_command_register() {
        let (_devices, function) = ours();
        let path = function.0.path().join("config");
        fs::write(&path, [0x34, 0x12, 0x44, 0x4d, 0x00, 0x05, 0x10, 0x00]).unwrap();
        function.change_command(PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0x34, 0x12, 0x44, 0x4d, 0x06, 0x05, 0x10, 0x00]);
        function.unmask_interrupt().unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0x34, 0x12, 0x44, 0x4d, 0x06, 0x01, 0x10, 0x00]);
    }
}
