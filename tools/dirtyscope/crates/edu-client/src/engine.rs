// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Result, ensure};
use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use vfio_client::{
    Container, Device, DeviceNode, RegionInfo,
    uapi::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX},
};

/// The most that it can copy at once: the size of its buffer.
pub const LENGTH_MAX: u64 = 4096;

/// Where its engine has that buffer.
const BUFFER: u64 = 0x40000;

// Registers of BAR 0.
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;

// Bits of COMMAND: the first is set while the engine works.
const START: u64 = 1;
const TO_MEMORY: u64 = 2;

/// The command register in configuration space, and what it needs to be reached and to do DMA.
const PCI_COMMAND: u64 = 4;
const PCI_COMMAND_MEMORY_MASTER: u16 = 2 | 4;

/// What takes longer is broken: a transfer takes 100 ms.
const LONG: Duration = Duration::from_secs(20);

/// An edu that is bound to `vfio-pci`, and open.
#[derive(Debug)]
pub struct Edu {
    device: Device,
    bar: RegionInfo,
}

impl Edu {
    /// Opens an edu whose group is in `container`, and enables its DMA.
    pub fn open(container: &Arc<Container>, node: &DeviceNode) -> Result<Self> {
        let device = Device::open(container, node)?;
        let this = Self { bar: device.region_info(VFIO_PCI_BAR0_REGION_INDEX, None)?, device };
        this.enable_dma()?;
        Ok(this)
    }

    /// The open device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Enables its DMA, as after [`Self::open`]; a reset disables it.
    pub fn enable_dma(&self) -> Result<()> {
        let config = self.device.region_info(VFIO_PCI_CONFIG_REGION_INDEX, None)?;
        let bytes = PCI_COMMAND_MEMORY_MASTER.to_le_bytes();
        let n = self.device.write_at(config.offset + PCI_COMMAND, &bytes)?;
        ensure!(n == bytes.len(), "{n} bytes of the command register were written");
        Ok(())
    }

    /// Copies `length` bytes of memory, at most [`LENGTH_MAX`], from one IOVA to another, by DMA. Takes
    /// 200 ms. What the IOMMU doesn't map is not written, and reads as anything.
    pub fn copy(&self, from: u64, to: u64, length: u64) -> Result<()> {
        ensure!(length <= LENGTH_MAX, "{length:#x} bytes don't fit into the buffer of edu");
        self.transfer(from, BUFFER, length, 0)?;
        self.transfer(BUFFER, to, length, TO_MEMORY)
    }

    fn transfer(&self, source: u64, destination: u64, length: u64, direction: u64) -> Result<()> {
        self.write(SOURCE, source)?;
        self.write(DESTINATION, destination)?;
        self.write(COUNT, length)?;
        self.write(COMMAND, START | direction)?;
        let begin = Instant::now();
        while self.read(COMMAND)? & START != 0 {
            ensure!(begin.elapsed() < LONG, "edu's DMA doesn't end");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn read(&self, register: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        let n = self.device.read_at(self.bar.offset + register, &mut bytes)?;
        ensure!(n == bytes.len(), "{n} bytes of a register of edu were read");
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, register: u64, value: u64) -> Result<()> {
        let bytes = value.to_le_bytes();
        let n = self.device.write_at(self.bar.offset + register, &bytes)?;
        ensure!(n == bytes.len(), "{n} bytes of a register of edu were written");
        Ok(())
    }
}
