// SPDX-License-Identifier: GPL-2.0-only

//! Where mediated devices come from, and go: `Documentation/driver-api/vfio-mediated-device.rst`.

use crate::{Error, Result};
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use uuid::Uuid;
use vfio_client::{DeviceNode, coverage};

const PARENTS: &str = "/sys/class/mdev_bus";
/// The drivers of such devices; the second one is for kernels that the first can't be built for, and has
/// the commands only.
const DRIVERS: [&str; 2] = ["rust_mdev_dma", "c_mdev_dma"];
const DEVICES: &str = "/sys/bus/mdev/devices";

/// A type of mediated device: a directory `mdev_supported_types/TYPE` of a parent.
#[derive(Clone, Debug)]
pub struct MdevType {
    path: PathBuf,
}

impl MdevType {
    /// Finds the type that the driver offers, as [`Self::of_driver`] does: `rust_mdev_dma` or, if that
    /// isn't there, `c_mdev_dma`.
    pub fn find() -> Result<Self> {
        let [first, second] = DRIVERS;
        Self::of_driver(first).or_else(|error| Self::of_driver(second).map_err(|_| error))
    }

    /// The driver that offers it: `rust_mdev_dma` or `c_mdev_dma`.
    pub fn driver(&self) -> &str {
        let name = self.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.split('-').next().unwrap_or_default()
    }

    /// Whether the driver has commands only: no generator, interrupts, migration, or logging.
    pub fn has_commands_only(&self) -> bool {
        self.driver() == DRIVERS[1]
    }

    /// Finds the type that a driver offers: the first one of any parent that begins with its name
    /// and `-`.
    pub fn of_driver(name: &str) -> Result<Self> {
        let prefix = format!("{name}-");
        let types = entries(Path::new(PARENTS))
            .unwrap_or_default()
            .into_iter()
            .filter_map(|parent| entries(&parent.join("mdev_supported_types")).ok())
            .flatten();
        for path in types {
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) {
                return Ok(Self { path });
            }
        }
        Err(Error::NoDriver(name.to_owned()))
    }

    /// Finds the type of this name, such as `dma-log`, if the driver offers it.
    pub fn named(name: &str) -> Result<Option<Self>> {
        let found = Self::find()?;
        let path = found.path.with_file_name(format!("{}-{name}", found.driver()));
        Ok(path.exists().then_some(Self { path }))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many more devices can be created.
    pub fn available_instances(&self) -> Result<u32> {
        let text = self.attribute("available_instances")?;
        text.parse().map_err(|_| Error::Unknown(format!("available_instances is {text:?}")))
    }

    /// The API of its devices, e.g. `vfio-pci`.
    pub fn device_api(&self) -> Result<String> {
        self.attribute("device_api")
    }

    /// Creates a device. Fails with `EEXIST` if there is one of this UUID, `EUSERS` if
    /// `available_instances` is 0.
    pub fn create(&self, uuid: Uuid) -> Result<Mdev> {
        let path = self.path.join("create");
        fs::write(&path, uuid.to_string()).map_err(|e| while_doing(e, "write", &path))?;
        Ok(Mdev { uuid })
    }

    fn attribute(&self, name: &str) -> Result<String> {
        let path = self.path.join(name);
        let text = fs::read_to_string(&path).map_err(|e| while_doing(e, "read", &path))?;
        Ok(text.trim_end().to_owned())
    }
}

/// A mediated device, by its UUID. That it exists isn't promised: others may remove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mdev {
    /// Its name.
    pub uuid: Uuid,
}

impl Mdev {
    /// Its directory.
    pub fn path(&self) -> PathBuf {
        Path::new(DEVICES).join(self.uuid.to_string())
    }

    /// Whether it exists.
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Its type.
    pub fn mdev_type(&self) -> Result<MdevType> {
        let link = self.path().join("mdev_type");
        let path = fs::canonicalize(&link).map_err(|e| while_doing(e, "follow", &link))?;
        Ok(MdevType { path })
    }

    /// How VFIO calls it.
    pub fn node(&self) -> Result<DeviceNode> {
        Ok(DeviceNode::from_sysfs(&self.path())?)
    }

    /// Removes it. Blocks while it is open.
    pub fn remove(&self) -> Result<()> {
        let path = self.path().join("remove");
        // It may be all that a thread does.
        coverage::trace();
        fs::write(&path, "1").map_err(|e| while_doing(e, "write", &path))
    }
}

/// The entries of a directory, sorted.
fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn while_doing(source: io::Error, verb: &str, path: &Path) -> Error {
    Error::Sysfs { what: format!("{verb} {}", path.display()), source }
}
