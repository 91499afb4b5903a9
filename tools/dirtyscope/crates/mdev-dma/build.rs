// SPDX-License-Identifier: GPL-2.0-only

//! Makes constants of the device's uapi header.

use std::{env, error::Error, path::Path};

const HEADER: &str = "../../../../include/uapi/linux/rust_mdev_dma.h";

fn main() -> Result<(), Box<dyn Error>> {
    let header = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join(HEADER);
    let header = header.to_str().ok_or("the path of the header is not UTF-8")?;
    println!("cargo:rerun-if-changed={header}");

    bindgen::builder()
        .header(header)
        .allowlist_item("RUST_MDEV_DMA_.*|rust_mdev_dma_.*")
        .prepend_enum_name(false)
        .generate_comments(false)
        .formatter(bindgen::Formatter::None)
        .generate()?
        .write_to_file(Path::new(&env::var("OUT_DIR")?).join("uapi.rs"))?;
    Ok(())
}
