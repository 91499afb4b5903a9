// SPDX-License-Identifier: GPL-2.0-only

//! What a client has, opened by calls as they come, and whether the device in it works.

use crate::backend::{Container, Opened};
use anyhow::{Context as _, Result, bail, ensure};
use mdev_dma::{MdevDma, PAGE, RegisterAccess, Width, uapi};
use std::{
    fmt,
    ops::Range,
    thread,
    time::{Duration, Instant},
};
use vfio_client::{
    MigState,
    hostile::{Answer, Ground, HostileFile, Request},
    uapi::{
        VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_SET,
    },
};

/// Pages of the ground: arguments, what we need ourselves, buffers, memory of the device, and at the end
/// a page that can only be read.
const PAGES: usize = 96;
const OURS: usize = PAGE as usize;
const BUFFER: usize = 2 * PAGE as usize;
/// Bytes of a state that are read or written at once.
pub const SAVED: usize = 4 * PAGE as usize;
const DEVICE_MEMORY: usize = 16 * PAGE as usize;

/// Pages that are mapped for the device.
pub const MAPPED: u64 = 64;
/// Where.
pub const IOVA: u64 = 0x4000_0000;

/// Migration states.
pub const ERROR: u32 = MigState::Error as u32;
pub const RUNNING: u32 = MigState::Running as u32;
pub const STOP_COPY: u32 = MigState::StopCopy as u32;
pub const RESUMING: u32 = MigState::Resuming as u32;
pub const RUNNING_P2P: u32 = MigState::RunningP2p as u32;

/// What takes longer is broken.
pub const LONG: Duration = Duration::from_secs(20);

/// A device that others stop may not go on. Nobody learns anything from waiting for it.
const SHORT: Duration = Duration::from_millis(100);

/// An address that a call is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// Where arguments are built.
    Argument,
    /// Memory, so many bytes from its begin.
    Buffer(u64),
    /// So many bytes before memory that can only be read.
    BeforeReadOnly(u64),
    /// So many bytes before the end of all memory.
    BeforeEnd(u64),
    /// Behind all memory.
    Hole,
    /// Any number.
    Number(u64),
}

impl Spot {
    /// Places that aren't good for anything.
    pub const BAD: [Self; 6] = [
        Self::Number(0),
        Self::Number(0x1_0000),
        Self::Hole,
        Self::Number(0xffff_8880_0000_0000),
        Self::Number(1 << 63),
        Self::Number(u64::MAX - 7),
    ];
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument => write!(f, "argument"),
            Self::Buffer(offset) => write!(f, "buffer+{offset:#x}"),
            Self::BeforeReadOnly(bytes) => write!(f, "read-only-{bytes:#x}"),
            Self::BeforeEnd(bytes) => write!(f, "end-{bytes:#x}"),
            Self::Hole => write!(f, "hole"),
            Self::Number(number) => write!(f, "{number:#x}"),
        }
    }
}

/// A container with a device that works, and memory.
pub struct World {
    // Closed in this order.
    pub data: Vec<HostileFile>,
    pub device: MdevDma<Registers>,
    /// Unless the device was opened by its own file.
    pub group: Option<HostileFile>,
    pub container: Container,
    pub iommufd: Option<HostileFile>,
    pub ground: &'static Ground,
    /// How long commands and the generator may take.
    pub patience: Duration,
    name: String,
}

/// Registers by calls as they come.
#[derive(Debug)]
pub struct Registers {
    pub file: HostileFile,
    ground: &'static Ground,
}

impl World {
    /// With a device that was opened.
    pub fn of(opened: Opened, iommufd: Option<HostileFile>, name: String) -> Self {
        let Opened { device, group, container } = opened;
        let ground = container.ground;
        let device = MdevDma::new(Registers { file: device, ground });
        Self { data: Vec::new(), device, group, container, iommufd, ground, patience: LONG, name }
    }

    /// The same container and device by other descriptors, and other memory.
    pub fn share(&self, ground: &'static Ground) -> Result<Self> {
        let file = self.file().duplicate()?;
        Ok(Self {
            data: Vec::new(),
            device: MdevDma::new(Registers { file, ground }),
            group: self.group.as_ref().map(HostileFile::duplicate).transpose()?,
            container: self.container.share(ground)?,
            iommufd: None,
            ground,
            patience: SHORT,
            name: self.name.clone(),
        })
    }

    /// `VFIO_GROUP_GET_DEVICE_FD`, once more, if there is a group.
    pub fn open_once_more(&self) -> Option<Answer> {
        let group = self.group.as_ref()?;
        self.ground.memory().write(OURS, format!("{}\0", self.name).as_bytes());
        Some(group.ioctl(self.ground, Request::vfio(6), self.ground.address(OURS), None))
    }

    /// Has the device take over a state, and go to another one.
    pub fn load(&mut self, stream: &[u8], target: u32) -> Result<Result<(), i32>> {
        self.write_state(stream, stream.len())?
            .map_or_else(|e| Ok(Err(e)), |()| Ok(self.set_state(target)))
    }

    /// Writes a state in RESUMING, by so many bytes. Returns how that failed, if it did.
    pub fn write_state(&mut self, stream: &[u8], chunk: usize) -> Result<Result<(), i32>> {
        if let Err(errno) = self.set_state(RESUMING) {
            bail!("RESUMING: errno {errno}");
        }
        let file = self.data.last().context("RESUMING came without a file")?;
        let chunk = chunk.clamp(1, SAVED);
        for part in stream.chunks(chunk) {
            self.ground.memory().write(BUFFER, part);
            let answer = file.write(self.ground, self.ground.address(BUFFER), part.len(), None);
            if answer.errno() != Some(0) {
                return Ok(Err(answer.errno().unwrap_or(-1)));
            }
        }
        Ok(Ok(()))
    }

    /// The address of a spot.
    pub fn address(&self, spot: Spot) -> u64 {
        address(self.ground, spot)
    }

    /// The file of the device.
    pub fn file(&self) -> &HostileFile {
        &self.device.access().file
    }

    /// The device's name, where a call takes one.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets the migration state. The data file that comes with it is the last of `data` then.
    pub fn set_state(&mut self, state: u32) -> Result<(), i32> {
        let flags = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
        match self.feature(flags, state) {
            Answer::Opened(file) => {
                self.data.push(file);
                Ok(())
            }
            answer => match answer.errno() {
                Some(0) => Ok(()),
                errno => Err(errno.unwrap_or(-1)),
            },
        }
    }

    /// The migration state.
    pub fn state(&self) -> Result<u32> {
        let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
        let answer = self.feature(flags, 0);
        ensure!(answer.errno() == Some(0), "MIG_DEVICE_STATE can't be read: {answer:?}");
        let mut word = [0; 4];
        self.ground.memory().read(OURS + 8, &mut word);
        Ok(u32::from_le_bytes(word))
    }

    fn feature(&self, flags: u32, state: u32) -> Answer {
        let words = [16, flags, state, u32::MAX].map(u32::to_le_bytes);
        self.ground.memory().write(OURS, words.as_flattened());
        let at = self.ground.address(OURS);
        self.file().ioctl(self.ground, Request::vfio(17), at, None)
    }

    /// Stops the device and reads its state.
    pub fn save(&mut self) -> Result<Vec<u8>> {
        if let Err(errno) = self.set_state(STOP_COPY) {
            bail!("to STOP_COPY: errno {errno}");
        }
        let file = self.data.last().context("STOP_COPY came without a file")?;
        let mut stream = Vec::new();
        loop {
            let answer = file.read(self.ground, self.ground.address(BUFFER), SAVED, None);
            let Answer::Done(len) = answer else { bail!("read of a state: {answer:?}") };
            if len == 0 {
                return Ok(stream);
            }
            let begin = stream.len();
            stream.resize(begin + len as usize, 0);
            self.ground.memory().read(BUFFER, &mut stream[begin..]);
        }
    }

    /// Resets the device, which always works.
    pub fn reset(&self) -> Result<()> {
        let answer = self.file().ioctl(self.ground, Request::vfio(11), 0, None);
        ensure!(answer.errno() == Some(0), "RESET: {answer:?}");
        Ok(())
    }

    /// After a reset the device is as new, whatever was done to it: it pins, writes what it says, unpins,
    /// and runs its generator.
    pub fn works(&mut self) -> Result<()> {
        self.reset()?;
        let state = self.state()?;
        ensure!(state == RUNNING, "after RESET the state is {state}, not RUNNING");
        let device = &self.device;
        ensure!(device.pins()? == 0, "after RESET there are {} pins", device.pins()?);
        device.check()?;
        // What was mapped there may have been unmapped, or mapped otherwise.
        self.container.restore(&self.device.access().file)?;
        let device = &self.device;
        for (what, outcome) in [
            ("PIN", device.pin(IOVA, 2 * PAGE)?),
            ("WRITE", device.write_pinned(IOVA, PAGE, 77)?),
            ("DMA_WRITE", device.dma_write(IOVA + PAGE, PAGE, 78)?),
            ("UNPIN", device.unpin(IOVA, 2 * PAGE)?),
        ] {
            ensure!(outcome.status == 0, "after RESET {what} fails with {}", outcome.status);
        }
        let mut page = vec![0; PAGE as usize];
        for (seed, number) in [(77, 0), (78, 1)] {
            let iova = IOVA + number * PAGE;
            self.ground.memory().read(DEVICE_MEMORY + (number * PAGE) as usize, &mut page);
            ensure!(mdev_dma::pattern::matches(&page, seed, iova), "memory at {iova:#x} is wrong");
        }
        Ok(())
    }

    /// The generator writes so many pages, and stops.
    pub fn generates(&self) -> Result<()> {
        let config = mdev_dma::GeneratorConfig {
            iova: IOVA,
            length: MAPPED * PAGE,
            seed: 5,
            limit: 8,
            rate: 0,
            mode: uapi::RUST_MDEV_DMA_GEN_PIN | uapi::RUST_MDEV_DMA_GEN_DMA_RW,
        };
        self.device.start_generator(&config)?;
        let begin = Instant::now();
        loop {
            let status = self.device.generator()?;
            if !status.is_running() {
                ensure!(status.status == 0 && status.counter == 8, "the generator: {status:?}");
                return Ok(());
            }
            ensure!(begin.elapsed() < self.patience, "the generator doesn't end: {status:?}");
            thread::sleep(Duration::from_micros(100));
        }
    }
}

/// The address of a spot.
pub fn address(ground: &Ground, spot: Spot) -> u64 {
    let len = ground.memory().len();
    let page = PAGE as usize;
    match spot {
        Spot::Argument => ground.address(0),
        Spot::Buffer(offset) => ground.address(BUFFER + offset as usize),
        Spot::BeforeReadOnly(bytes) => ground.address(len - page - bytes as usize),
        Spot::BeforeEnd(bytes) => ground.address(len - bytes as usize),
        Spot::Hole => ground.address(len + page),
        Spot::Number(number) => number,
    }
}

/// Memory for all that a client does.
pub fn ground() -> Result<&'static Ground> {
    Ok(Ground::new(PAGES * PAGE as usize)?)
}

/// Where the ground has the device's memory.
pub fn device_pages() -> Range<usize> {
    DEVICE_MEMORY..DEVICE_MEMORY + (MAPPED * PAGE) as usize
}

/// The address of the device's memory.
pub fn device_memory(ground: &Ground) -> u64 {
    ground.address(DEVICE_MEMORY)
}

impl Registers {
    /// Of a device that is open.
    pub fn new(file: HostileFile, ground: &'static Ground) -> Self {
        Self { file, ground }
    }
}

impl RegisterAccess for Registers {
    type Error = anyhow::Error;

    fn read(&self, register: u32, width: Width) -> Result<u64> {
        let (len, at) = (width.bytes(), self.ground.address(OURS));
        let answer = self.file.read(self.ground, at, len, Some(register.into()));
        transferred(&answer, len).with_context(|| format!("read register {register:#x}"))?;
        let mut bytes = [0; 8];
        self.ground.memory().read(OURS, &mut bytes[..len]);
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, register: u32, width: Width, value: u64) -> Result<()> {
        let (len, at) = (width.bytes(), self.ground.address(OURS));
        self.ground.memory().write(OURS, &value.to_le_bytes());
        let answer = self.file.write(self.ground, at, len, Some(register.into()));
        transferred(&answer, len).with_context(|| format!("write register {register:#x}"))
    }
}

fn transferred(answer: &Answer, len: usize) -> Result<()> {
    match answer {
        Answer::Done(n) if *n as usize == len => Ok(()),
        answer => bail!("{answer:?}"),
    }
}
