// SPDX-License-Identifier: GPL-2.0-only

//! The device as a PCI function that QEMU gives to a machine.

use super::QemuVmm;
use crate::{
    cases::{MachineCase, WINDOW},
    pair::MachinePair,
    runner::case,
    vmm::Machine as _,
};
use anyhow::{Context as _, Result, anyhow, ensure};
use harness::Skip;
use mdev_dma::{Opcode, PAGE, Width, uapi::RUST_MDEV_DMA_IRQ_COMMAND};
use std::{fmt::Write as _, fs, process::Command};

/// These cases.
pub const CASES: &[MachineCase<QemuVmm>] = &[
    case("pci/lspci", "lspci -vvv understands configuration space", lspci),
    case("pci/intx", "a command that ends raises INTx, until that is acknowledged", intx),
    case("pci/msi", "a command that ends sends a message, also where the machine migrates to", msi),
];

/// What lspci must find, once BAR 0 and DMA are set up.
const FOUND: &[&str] = &[
    "1234:4d44",
    "Mem+ BusMaster+",
    "INTx-",
    "Interrupt: pin A",
    "Region 0: Memory at e0040000 (32-bit, non-prefetchable)",
    "Capabilities: [",
    "MSI: Enable- Count=1/2 Maskable- 64bit+",
];

/// What it says of what it doesn't understand.
const NOT_UNDERSTOOD: &[&str] = &["!!!", "??", "unknown header", "broken", "Unknown"];

fn lspci(pair: &mut MachinePair<'_, QemuVmm>) -> Result<()> {
    pair.start(1)?;
    let mut dump = String::from("00:04.0 the device\n");
    for (i, line) in pair.here().function(0).config_space()?.chunks(16).enumerate() {
        let bytes: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(dump, "{:02x}: {}", i * 16, bytes.join(" "))?;
    }
    let file = pair.file("config-space");
    fs::write(&file, &dump).context("write the dump for lspci")?;
    let output = Command::new("lspci").args(["-vvv", "-nn", "-F"]).arg(&file).output();
    let output = output.map_err(|error| anyhow!(Skip(format!("lspci: {error}"))))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "lspci, {}: {errors}", output.status);
    for what in FOUND {
        ensure!(text.contains(what), "lspci doesn't say \"{what}\":\n{text}\n{dump}");
    }
    for what in NOT_UNDERSTOOD {
        ensure!(!text.contains(what), "lspci says \"{what}\":\n{text}\n{dump}");
    }
    Ok(())
}

fn intx(pair: &mut MachinePair<'_, QemuVmm>) -> Result<()> {
    pair.start(1)?;
    pair.here().qtest().watch_interrupts("ioapic")?;
    pair.here().device(0).enable_irqs(RUST_MDEV_DMA_IRQ_COMMAND)?;
    for _ in 0..2 {
        pair.begin_write(0, WINDOW)?;
        pair.until("for INTx to be raised", |machine| {
            machine.function(0).check_ids()?;
            Ok(!machine.qtest().raised().is_empty())
        })?;
        let device = pair.here().device(0);
        let status = device.outcome()?.status;
        ensure!(status == 0, "there was an interrupt, and the command's status is {status}");
        let events = device.irq_status()?;
        ensure!(events == RUST_MDEV_DMA_IRQ_COMMAND, "IRQ_STATUS is {events:#x}");
        device.clear_irqs(RUST_MDEV_DMA_IRQ_COMMAND)?;
        pair.until("for INTx to be lowered", |machine| {
            machine.function(0).check_ids()?;
            Ok(machine.qtest().raised().is_empty())
        })?;
    }
    Ok(())
}

fn msi(pair: &mut MachinePair<'_, QemuVmm>) -> Result<()> {
    /// The page that messages go to.
    const PAGE_OF_MESSAGE: u64 = WINDOW.start - 1;
    const ADDRESS: u64 = PAGE_OF_MESSAGE * PAGE;
    const DATA: u16 = 0x4300;

    pair.start(1)?;
    pair.here().function(0).enable_msi(ADDRESS as u32, DATA)?;
    for migrations in 0..3 {
        if migrations > 0 {
            // The device makes the page what everybody can compute; that isn't to be told to it.
            pair.here().device(0).enable_irqs(0)?;
            pair.write(0, Opcode::DmaWrite, PAGE_OF_MESSAGE..PAGE_OF_MESSAGE + 1)?;
            pair.begin()?;
            pair.passes(1)?;
            pair.complete()?;
        }
        pair.here().device(0).enable_irqs(RUST_MDEV_DMA_IRQ_COMMAND)?;
        pair.begin_write(0, WINDOW)?;
        pair.until("for a message", |machine| {
            Ok(machine.qtest().read(ADDRESS, Width::Long)? == u64::from(DATA))
        })?;
        let status = pair.here().device(0).outcome()?.status;
        ensure!(status == 0, "there was a message, and the command's status is {status}");
    }
    Ok(())
}
