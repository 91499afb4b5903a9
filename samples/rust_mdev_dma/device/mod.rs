// SPDX-License-Identifier: GPL-2.0

//! The device, as VFIO sees it: regions, and what is behind them.

mod config_space;
mod engine;
mod generator;
mod migration;
mod pattern;
mod registers;

use crate::{
    abstractions::vfio::{DeviceInfo, OpenDevice, Operations, RegionInfo},
    bindings::{
        RUST_MDEV_DMA_IRQ_COMMAND as IRQ_COMMAND, RUST_MDEV_DMA_IRQ_GENERATOR as IRQ_GENERATOR,
        RUST_MDEV_DMA_REGION_SHIFT as REGION_SHIFT, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET,
        VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_IRQS,
        VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    },
    module_parameters,
};
use config_space::ConfigSpace;
use engine::{Command, Engine, Limits, Outcome};
use generator::Generator;
use kernel::{
    new_mutex,
    prelude::*,
    sync::Mutex,
    uaccess::{UserSliceReader, UserSliceWriter},
};
use migration::Saved;
use registers::{Registers, BAR_SIZE};

/// An open device.
#[pin_data]
pub(crate) struct MdevDma {
    /// Everything there is to the device, but its pins.
    ///
    /// # Locking
    ///
    /// Held while a command runs in the foreground, and while the generator writes a slice, but not
    /// while a command runs in the background. Taken before whatever [`OpenDevice`] locks, and never
    /// in `dma_unmap`. User memory is only accessed under it by `vfio_dma_rw()`, not for the buffers
    /// of system calls. [`Operations::work`] takes it, so nobody who holds it may wait for that.
    #[pin]
    state: Mutex<State>,
}

struct State {
    limits: Limits,
    config_space: ConfigSpace,
    registers: Registers,
    /// What runs commands; taken away while one runs in the background.
    engine: Option<Engine>,
    /// A command that is to run in the background, and doesn't yet.
    waiting: Option<Command>,
    generator: Generator,
    /// Whether the device may do DMA and interrupt.
    running: bool,
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

/// Copies a value from the user that has as many bytes as there are. With a size that the compiler
/// knows, this is less work than `read_slice()`.
fn read_value(buf: &mut UserSliceReader) -> Result<u64> {
    Ok(match buf.len() {
        1 => buf.read::<u8>()?.into(),
        2 => u16::from_le(buf.read()?).into(),
        4 => u32::from_le(buf.read()?).into(),
        8 => u64::from_le(buf.read()?),
        _ => return Err(EINVAL),
    })
}

/// Copies as many bytes of a value to the user as there are to be.
fn write_value(buf: &mut UserSliceWriter, value: u64) -> Result {
    match buf.len() {
        1 => buf.write(&(value as u8)),
        2 => buf.write(&(value as u16).to_le()),
        4 => buf.write(&(value as u32).to_le()),
        8 => buf.write(&value.to_le()),
        _ => Err(EINVAL),
    }
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
            limits,
            config_space: ConfigSpace::new(),
            registers: Registers::new(limits),
            engine: Some(Engine::new(limits)?),
            waiting: None,
            generator: Generator::new()?,
            running: true,
        })
    }

    fn reset(&mut self) {
        self.config_space = ConfigSpace::new();
        self.registers = Registers::new(self.limits);
        self.waiting = None;
        self.generator.reset();
    }

    /// The device runs from now on.
    fn resume(&mut self, dev: &OpenDevice<MdevDma>) {
        self.running = true;
        self.generator.start_pace();
        self.update_intx(dev);
        self.queue_work(dev);
    }

    fn read_bar(&mut self, dev: &OpenDevice<MdevDma>, offset: usize, bytes: &mut [u8]) {
        if Registers::shows_pins(offset, bytes.len()) {
            self.registers.set_pins(dev.pins().held());
        }
        self.registers.read(offset, bytes);
    }

    fn write_bar(&mut self, dev: &OpenDevice<MdevDma>, offset: usize, bytes: &[u8]) {
        let effects = self.registers.write(offset, bytes);
        if let Some((command, background)) = effects.command {
            self.ring(dev, command, background);
        }
        if let Some((control, program)) = effects.generator {
            self.generator.control(control, program, self.limits);
            self.show_generator();
            self.queue_work(dev);
        }
        if effects.interrupts {
            self.update_intx(dev);
        }
    }

    /// Runs a command, or has it run in the background.
    fn ring(&mut self, dev: &OpenDevice<MdevDma>, command: Command, background: bool) {
        let engine = match &mut self.engine {
            Some(engine) if self.waiting.is_none() => engine,
            _ => return self.registers.set_refused(true),
        };
        self.registers.set_refused(false);

        if background || !self.running {
            self.registers.set_in_progress();
            self.waiting = Some(command);
            self.queue_work(dev);
        } else {
            let outcome = engine.run(dev, &command);
            self.complete(dev, &outcome);
        }
    }

    fn complete(&mut self, dev: &OpenDevice<MdevDma>, outcome: &Outcome) {
        self.registers.complete(outcome);
        self.raise(dev, IRQ_COMMAND);
    }

    /// Has the work run, if there is any.
    fn queue_work(&self, dev: &OpenDevice<MdevDma>) {
        let work = self.waiting.is_some() || self.generator.program().is_some();
        if work && self.running {
            dev.queue_work(0);
        }
    }

    /// Takes what is needed to run the command that waits.
    fn begin(&mut self) -> Option<(Engine, Command)> {
        if !self.running || self.waiting.is_none() {
            return None;
        }
        Some((self.engine.take()?, self.waiting.take()?))
    }

    /// Has the generator write what is due, and sees to it that it goes on.
    fn generate(&mut self, dev: &OpenDevice<MdevDma>) {
        if !self.running || self.generator.program().is_none() {
            return;
        }
        let next = self.generator.run(dev, self.limits);
        self.show_generator();
        match next {
            Some(delay) => dev.queue_work(delay),
            None => self.raise(dev, IRQ_GENERATOR),
        }
    }

    fn show_generator(&mut self) {
        let running = self.generator.program().is_some();
        let (status, counter) = (self.generator.status(), self.generator.counter());
        self.registers.set_generator(running, status, counter);
    }

    /// Something has happened that may interrupt.
    fn raise(&mut self, dev: &OpenDevice<MdevDma>, irq: u32) {
        if self.registers.raise(irq) {
            dev.interrupts().send_msi(irq.trailing_zeros() as usize);
        }
        self.update_intx(dev);
    }

    /// Whatever INTx depends on may have changed.
    fn update_intx(&mut self, dev: &OpenDevice<MdevDma>) {
        let pending = self.registers.interrupt_pending();
        self.config_space.set_interrupt_status(pending);
        let asserted = pending && self.running && !self.config_space.intx_disabled();
        dev.interrupts().assert_intx(asserted);
    }
}

impl Operations for MdevDma {
    type OwnerModule = crate::RustMdevDma;

    const NAME: &'static CStr = crate::NAME;

    const INFO: DeviceInfo = DeviceInfo {
        flags: VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET,
        num_regions: VFIO_PCI_NUM_REGIONS,
        num_irqs: VFIO_PCI_NUM_IRQS,
    };

    const MSI_VECTORS: usize = config_space::MSI_VECTORS;

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
        match region {
            Region::ConfigSpace => {
                let mut bytes = [0; config_space::SIZE];
                let bytes = &mut bytes[..config_space_access(offset, buf.len())?];
                self.state.lock().config_space.read(offset, bytes);
                buf.write_slice(bytes)?;
                Ok(bytes.len())
            }
            Region::Bar0 => {
                let len = buf.len();
                check_bar_access(offset, len)?;
                let mut bytes = [0; registers::ACCESS];
                self.state.lock().read_bar(dev, offset, &mut bytes[..len]);
                write_value(&mut buf, u64::from_le_bytes(bytes))?;
                Ok(len)
            }
        }
    }

    fn write(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        mut buf: UserSliceReader,
        offset: u64,
    ) -> Result<usize> {
        let (region, offset) = Region::at(offset)?;
        match region {
            Region::ConfigSpace => {
                let mut bytes = [0; config_space::SIZE];
                let bytes = &mut bytes[..config_space_access(offset, buf.len())?];
                buf.read_slice(bytes)?;
                let mut state = self.state.lock();
                state.config_space.write(offset, bytes);
                state.update_intx(dev);
                Ok(bytes.len())
            }
            Region::Bar0 => {
                let len = buf.len();
                check_bar_access(offset, len)?;
                let bytes = read_value(&mut buf)?.to_le_bytes();
                self.state.lock().write_bar(dev, offset, &bytes[..len]);
                Ok(len)
            }
        }
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

    fn reset(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        // From here on no work begins, and what has begun ends.
        self.state.lock().running = false;
        dev.abort_work();

        let mut state = self.state.lock();
        dev.pins().unpin_all();
        state.reset();
        state.resume(dev);
    }

    fn quiesce(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        self.state.lock().running = false;
        dev.stop_work();
        self.state.lock().update_intx(dev);
    }

    fn resume(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        self.state.lock().resume(dev);
    }

    fn save_identity(self: Pin<&Self>, stream: &mut KVVec<u8>) -> Result {
        migration::save_identity(stream)
    }

    fn save(self: Pin<&Self>, dev: &OpenDevice<Self>, stream: &mut KVVec<u8>) -> Result {
        migration::save(&self.state.lock(), dev, stream)
    }

    fn load(self: Pin<&Self>, dev: &OpenDevice<Self>, stream: &[u8]) -> Result {
        let mut state = self.state.lock();
        dev.pins().unpin_all();
        state.reset();
        let restored =
            Saved::new(stream, state.limits).and_then(|saved| saved.restore(&mut state, dev));
        state.update_intx(dev);
        restored
    }

    fn saved_size(self: Pin<&Self>, dev: &OpenDevice<Self>) -> usize {
        migration::size(dev.pins().runs().count())
    }

    fn max_saved_size() -> usize {
        let pins = *module_parameters::max_pins.value_ref();
        migration::size(usize::try_from(pins).unwrap_or(usize::MAX))
    }

    fn work(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        let mut state = self.state.lock();
        if let Some((mut engine, command)) = state.begin() {
            drop(state);
            let outcome = engine.run(dev, &command);
            state = self.state.lock();
            state.engine = Some(engine);
            state.complete(dev, &outcome);
        }
        state.generate(dev);
    }
}
