// SPDX-License-Identifier: GPL-2.0-only

//! What a device has its memory from, and how it is opened then.

use crate::world::{self, LONG, World};
use anyhow::{Result, bail, ensure};
use mdev_dma::{PAGE, sysfs::Mdev};
use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};
use vfio_client::{
    DeviceNode,
    hostile::{Answer, Ground, HostileFile, Request},
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE1v2_IOMMU},
};

/// What a device has its memory from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// A container, by the group.
    Type1,
    /// iommufd, which takes the calls of a container, by the group.
    Group,
    /// iommufd, by the device's own file.
    Cdev,
}

const CONTAINER: &str = "/dev/vfio/vfio";
const IOMMUFD: &str = "/dev/iommu";

/// Where the structure of a call is made.
const OURS: usize = PAGE as usize;

const EBUSY: i32 = 16;
const EINVAL: i32 = 22;

impl Backend {
    /// Those that this kernel has for a device.
    pub fn all(mdev: Mdev) -> Vec<Self> {
        let mut all = vec![Self::Type1];
        if Path::new(IOMMUFD).exists() {
            all.push(Self::Group);
            if DeviceNode::cdev(&mdev.path()).is_ok_and(|path| path.exists()) {
                all.push(Self::Cdev);
            }
        }
        all
    }

    /// The files that a user needs.
    pub fn paths(self, mdev: Mdev) -> Result<[PathBuf; 2]> {
        let group =
            || -> Result<PathBuf> { Ok(format!("/dev/vfio/{}", mdev.node()?.group()).into()) };
        Ok(match self {
            Self::Type1 => [CONTAINER.into(), group()?],
            Self::Group => [IOMMUFD.into(), group()?],
            Self::Cdev => [IOMMUFD.into(), DeviceNode::cdev(&mdev.path())?],
        })
    }

    /// Opens a device that nobody has open, with memory.
    pub fn open(self, mdev: Mdev, ground: &'static Ground) -> Result<Opened> {
        let [container, node] = self.paths(mdev)?;
        let name = mdev.uuid.to_string();
        let container = Container { file: open(&container)?, ground, backend: self, ioas: 0 };
        if self == Self::Cdev { container.by_cdev(&node) } else { container.by_group(&node, &name) }
    }
}

/// A device that was opened.
pub struct Opened {
    pub device: HostileFile,
    pub group: Option<HostileFile>,
    pub container: Container,
}

/// What takes the calls of a container.
pub struct Container {
    pub file: HostileFile,
    pub ground: &'static Ground,
    pub backend: Backend,
    /// The address space that these calls are about, of iommufd.
    ioas: u32,
}

impl Container {
    fn by_group(mut self, node: &Path, name: &str) -> Result<Opened> {
        let group = patiently(EBUSY, || HostileFile::open(&node.to_string_lossy()))?;
        let number = self.file.number().to_le_bytes();
        done("GROUP_SET_CONTAINER", &call(self.ground, &group, Request::vfio(4), &number))?;
        let iommu = u64::from(VFIO_TYPE1v2_IOMMU);
        done("SET_IOMMU", &self.file.ioctl(self.ground, Request::vfio(2), iommu, None))?;
        if self.backend == Backend::Group {
            self.ioas = self.vfio_ioas(0, 0)?;
        }
        self.map()?;
        let name = format!("{name}\0");
        let opened = call(self.ground, &group, Request::vfio(6), name.as_bytes());
        let Answer::Opened(device) = opened else { bail!("GROUP_GET_DEVICE_FD: {opened:?}") };
        Ok(Opened { device, group: Some(group), container: self })
    }

    fn by_cdev(mut self, node: &Path) -> Result<Opened> {
        // Who was killed may still be ending, and has it bound or the group open.
        let begin = Instant::now();
        let device = loop {
            let device = open(node)?;
            let mut bytes = words32(&[24, 0, self.file.number() as u32, 0]);
            bytes.extend(words64(&[0]));
            let bound = call(self.ground, &device, Request::vfio(18), &bytes);
            match bound.errno() {
                Some(EBUSY | EINVAL) if begin.elapsed() < LONG => {
                    thread::sleep(Duration::from_millis(1));
                }
                _ => {
                    done("BIND_IOMMUFD", &bound)?;
                    break device;
                }
            }
        };
        self.attach_anew(&device)?;
        self.map()?;
        Ok(Opened { device, group: None, container: self })
    }

    /// Another descriptor of it, for a thread with other memory.
    pub fn share(&self, ground: &'static Ground) -> Result<Self> {
        let &Self { backend, ioas, .. } = self;
        Ok(Self { file: self.file.duplicate()?, ground, backend, ioas })
    }

    /// An address space for a device, which may have been detached from the one it had.
    fn attach_anew(&mut self, device: &HostileFile) -> Result<()> {
        let answer = self.call(Request(b';', 0x81), &words32(&[12, 0, 0]));
        done("IOAS_ALLOC", &answer)?;
        let mut word = [0; 4];
        self.ground.memory().read(OURS + 8, &mut word);
        self.ioas = u32::from_le_bytes(word);
        self.vfio_ioas(self.ioas, 1)?;
        let attached =
            call(self.ground, device, Request::vfio(19), &words32(&[16, 0, self.ioas, 0]));
        done("ATTACH_PT", &attached)
    }

    /// Whatever calls have done to it, the calls of a container are about the device's memory again, which
    /// is all that is mapped.
    pub fn restore(&mut self, device: &HostileFile) -> Result<()> {
        match self.backend {
            Backend::Type1 => (),
            Backend::Group => {
                self.vfio_ioas(self.ioas, 1)?;
            }
            Backend::Cdev => self.attach_anew(device)?,
        }
        self.unmap()?;
        self.map()
    }

    /// `IOMMU_VFIO_IOAS`: gets (0) or sets (1) the address space that the calls of a container are about.
    fn vfio_ioas(&self, ioas: u32, op: u32) -> Result<u32> {
        done("VFIO_IOAS", &self.call(Request(b';', 0x88), &words32(&[12, ioas, op])))?;
        let mut word = [0; 4];
        self.ground.memory().read(OURS + 4, &mut word);
        Ok(u32::from_le_bytes(word))
    }

    fn map(&self) -> Result<()> {
        let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
        let mut bytes = words32(&[32, flags]);
        let (iova, length) = (world::IOVA, world::MAPPED * PAGE);
        bytes.extend(words64(&[world::device_memory(self.ground), iova, length]));
        done("MAP_DMA", &self.call(Request::vfio(13), &bytes))
    }

    /// Unmaps all there is.
    pub fn unmap(&self) -> Result<()> {
        const ALL: u32 = 2;
        let mut bytes = words32(&[24, ALL]);
        bytes.extend(words64(&[0, 0]));
        done("UNMAP_DMA of all", &self.call(Request::vfio(14), &bytes))
    }

    fn call(&self, request: Request, bytes: &[u8]) -> Answer {
        call(self.ground, &self.file, request, bytes)
    }
}

impl World {
    /// With a device that nobody has open.
    pub fn new(mdev: Mdev, backend: Backend, ground: &'static Ground) -> Result<Self> {
        let opened = backend.open(mdev, ground)?;
        let iommufd = match backend {
            Backend::Cdev => Some(opened.container.file.duplicate()?),
            _ => HostileFile::open(IOMMUFD).ok(),
        };
        Ok(Self::of(opened, iommufd, mdev.uuid.to_string()))
    }
}

fn open(path: &Path) -> Result<HostileFile> {
    Ok(HostileFile::open(&path.to_string_lossy())?)
}

/// Does what fails with an errno while somebody who was killed is still ending.
fn patiently(
    errno: i32,
    what: impl Fn() -> vfio_client::Result<HostileFile>,
) -> Result<HostileFile> {
    let begin = Instant::now();
    loop {
        match what() {
            Err(error) if error.errno() == errno && begin.elapsed() < LONG => {
                thread::sleep(Duration::from_millis(1));
            }
            opened => break Ok(opened?),
        }
    }
}

/// A call with a structure, behind which there is nothing that looks like an address.
fn call(ground: &Ground, file: &HostileFile, request: Request, bytes: &[u8]) -> Answer {
    let mut argument = [0; 256];
    argument[..bytes.len()].copy_from_slice(bytes);
    ground.memory().write(OURS, &argument);
    file.ioctl(ground, request, ground.address(OURS), None)
}

fn done(what: &str, answer: &Answer) -> Result<()> {
    ensure!(answer.errno() == Some(0), "{what}: {answer:?}");
    Ok(())
}

fn words32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn words64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
