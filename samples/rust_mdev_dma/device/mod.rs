// SPDX-License-Identifier: GPL-2.0

//! The device, as VFIO sees it: regions, and what is behind them.

mod config_space;
mod engine;
mod pattern;
mod registers;

use crate::{
    abstractions::vfio::{DeviceInfo, IrqInfo, OpenDevice, Operations, RegionInfo},
    bindings::{
        RUST_MDEV_DMA_REGION_SHIFT as REGION_SHIFT, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET,
        VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_IRQS,
        VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    },
    module_parameters,
};
use config_space::ConfigSpace;
use engine::{Engine, Limits};
use kernel::{
    new_mutex,
    prelude::*,
    sync::Mutex,
    uaccess::{UserSliceReader, UserSliceWriter},
};
use registers::{Registers, BAR_SIZE};

/// An open device.
#[pin_data]
pub(crate) struct MdevDma {
    /// Everything there is to the device, but its pins.
    ///
    /// # Locking
    ///
    /// Held while a command runs, so there is one at a time. Taken before [`OpenDevice::pins`], and
    /// never in `dma_unmap`. User memory is only accessed under it by `vfio_dma_rw()`, not for the
    /// buffers of system calls.
    #[pin]
    state: Mutex<State>,
}

struct State {
    config_space: ConfigSpace,
    registers: Registers,
    engine: Engine,
}

/// A region of the device's file.
enum Region {
    ConfigSpace,
    Bar0,
}

impl Region {
    /// Which region `offset` lies in, and where.
    fn at(offset: u64) -> Result<(Self, usize)> {
        let within = usize::try_from(offset & ((1 << REGION_SHIFT) - 1))?;
        match u32::try_from(offset >> REGION_SHIFT)? {
            VFIO_PCI_BAR0_REGION_INDEX => Ok((Self::Bar0, within)),
            VFIO_PCI_CONFIG_REGION_INDEX => Ok((Self::ConfigSpace, within)),
            _ => Err(EINVAL),
        }
    }
}

/// Checks an access to the BAR.
fn check_bar_access(offset: usize, len: usize) -> Result {
    let legal = matches!(len, 1 | 2 | 4 | 8) && offset % len == 0 && offset < BAR_SIZE;
    legal.then_some(()).ok_or(EINVAL)
}

/// Checks an access to configuration space; returns how much of it there is.
fn config_space_access(offset: usize, len: usize) -> Result<usize> {
    match config_space::SIZE.checked_sub(offset) {
        None | Some(0) => Err(EINVAL),
        Some(rest) => Ok(len.min(rest)),
    }
}

impl State {
    fn new() -> Result<Self> {
        let limits = Limits {
            pins: *module_parameters::max_pins.value_ref(),
            length: *module_parameters::max_length.value_ref(),
        };
        Ok(Self {
            config_space: ConfigSpace::new(),
            registers: Registers::new(limits),
            engine: Engine::new(limits)?,
        })
    }

    fn reset(&mut self) {
        self.config_space = ConfigSpace::new();
        self.registers = Registers::new(self.engine.limits());
    }

    fn read_bar(&mut self, dev: &OpenDevice<MdevDma>, offset: usize, bytes: &mut [u8]) {
        if Registers::shows_pins(offset, bytes.len()) {
            self.registers.set_pins(dev.pins().held());
        }
        self.registers.read(offset, bytes);
    }

    fn write_bar(&mut self, dev: &OpenDevice<MdevDma>, offset: usize, bytes: &[u8]) {
        if let Some(command) = self.registers.write(offset, bytes) {
            let outcome = self.engine.run(dev, &command);
            self.registers.complete(&outcome);
        }
    }
}

impl Operations for MdevDma {
    const NAME: &'static CStr = crate::NAME;

    const INFO: DeviceInfo = DeviceInfo {
        flags: VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET,
        num_regions: VFIO_PCI_NUM_REGIONS,
        num_irqs: VFIO_PCI_NUM_IRQS,
    };

    fn open(_dev: &OpenDevice<Self>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            state <- new_mutex!(State::new()?, "MdevDma::state"),
        })
    }

    fn read(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        mut buf: UserSliceWriter,
        offset: u64,
    ) -> Result<usize> {
        let (region, offset) = Region::at(offset)?;
        let mut bytes = [0; config_space::SIZE];
        let bytes = match region {
            Region::ConfigSpace => {
                let bytes = &mut bytes[..config_space_access(offset, buf.len())?];
                self.state.lock().config_space.read(offset, bytes);
                bytes
            }
            Region::Bar0 => {
                check_bar_access(offset, buf.len())?;
                let bytes = &mut bytes[..buf.len()];
                self.state.lock().read_bar(dev, offset, bytes);
                bytes
            }
        };
        buf.write_slice(bytes)?;
        Ok(bytes.len())
    }

    fn write(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        mut buf: UserSliceReader,
        offset: u64,
    ) -> Result<usize> {
        let (region, offset) = Region::at(offset)?;
        let len = match region {
            Region::ConfigSpace => config_space_access(offset, buf.len())?,
            Region::Bar0 => check_bar_access(offset, buf.len()).map(|()| buf.len())?,
        };
        let mut bytes = [0; config_space::SIZE];
        let bytes = &mut bytes[..len];
        buf.read_slice(bytes)?;

        let mut state = self.state.lock();
        match region {
            Region::ConfigSpace => state.config_space.write(offset, bytes),
            Region::Bar0 => state.write_bar(dev, offset, bytes),
        }
        Ok(len)
    }

    fn region_info(index: u32) -> Result<RegionInfo> {
        let size = match index {
            VFIO_PCI_BAR0_REGION_INDEX => BAR_SIZE,
            VFIO_PCI_CONFIG_REGION_INDEX => config_space::SIZE,
            _ => 0,
        };
        let flags = match size {
            0 => 0,
            _ => VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
        };
        Ok(RegionInfo {
            flags,
            size: size as u64,
            offset: u64::from(index) << REGION_SHIFT,
        })
    }

    fn irq_info(_index: u32) -> Result<IrqInfo> {
        Ok(IrqInfo { flags: 0, count: 0 })
    }

    fn reset(self: Pin<&Self>, dev: &OpenDevice<Self>) -> Result {
        let mut state = self.state.lock();
        dev.pins().unpin_all();
        state.reset();
        Ok(())
    }
}
