"""Product exports of Shopify and WooCommerce, in their own formats, with local photos; hostile files among them."""

import csv
import io
import stat
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hanse_client import cli, product_export
from hanse_client.catalog import Catalog
from hanse_client.product_export import LocalPhotos, import_products, read_export
from hanse_common.errors import CatalogError, ConfigError
from hanse_common.vision.taxonomy import LabelMap, Taxonomy

SHOPIFY = [
    "Handle",
    "Title",
    "Body (HTML)",
    "Vendor",
    "Product Category",
    "Type",
    "Tags",
    "Published",
    "Option1 Name",
    "Option1 Value",
    "Variant SKU",
    "Variant Price",
    "Image Src",
    "Image Position",
    "Image Alt Text",
    "Gift Card",
    "SEO Title",
    "Variant Image",
    "Status",
]
SHOPIFY_NEW = [
    "Title",
    "URL handle",
    "Description",
    "Vendor",
    "Product category",
    "Type",
    "Tags",
    "Published on online store",
    "Status",
    "SKU",
    "Option1 name",
    "Option1 value",
    "Price",
    "Product image URL",
    "Image position",
    "Image alt text",
    "Variant image URL",
    "Gift card",
]
WOOCOMMERCE = [
    "ID",
    "Type",
    "SKU",
    "Name",
    "Published",
    "Is featured?",
    "Visibility in catalog",
    "Short description",
    "Description",
    "Regular price",
    "Categories",
    "Tags",
    "Shipping class",
    "Images",
    "Download limit",
    "Parent",
    "Position",
    "Attribute 1 name",
    "Attribute 1 value(s)",
]
CDN = "https://cdn.shopify.com/s/files/1/0001/2345/files/"
UPLOADS = "https://shop.example/wp-content/uploads/"


def export(folder: Path, columns: list[str], *rows: dict[str, str]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / "export.csv"
    path.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    return path


def put(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), (number, len(name)) * 2, dtype=np.uint8)).save(path, "PNG")


def rows(path: Path) -> list[tuple[str, ...]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


# Shopify


def test_shopify(tmp_path: Path, images: Path) -> None:
    put(images, "tee-front.jpg", "tee back.png", "tee-red.jpg", "boot.webp", "spare.jpg")
    path = export(
        tmp_path,
        SHOPIFY,
        {
            "Handle": "tee",
            "Title": 'Größe,  \n"M"',
            "Body (HTML)": "<p>" + "long\n" * 5000,
            "Product Category": "Apparel & Accessories > Clothing",
            "Type": "T-Shirts",
            "Variant SKU": "TEE-S",
            "Image Src": f"{CDN}tee-front.jpg?v=1700000000",
            "Image Position": "1",
        },
        {
            "Handle": "tee",
            "Variant SKU": "TEE-M",
            "Image Src": f"{CDN}tee%20back.png?v=1",
            "Image Position": "2",
        },
        {"Handle": "tee", "Variant SKU": "TEE-L", "Variant Image": f"{CDN}tee-red.jpg"},
        {"Handle": "tee", "Image Src": f"{CDN}tee-front.jpg?v=1700000000"},
        {
            "Handle": "boot",
            "Title": "Boot",
            "Product Category": "Shoes > Boots",
            "Image Src": f"{CDN}boot.webp",
        },
        {"Handle": "hat", "Title": "Hat", "Tags": "headwear, summer", "Image Src": f"{CDN}hat.jpg?v=3"},
        {"Handle": "card", "Title": "Gift card", "Type": "Cards"},
        {"Handle": "odd", "Title": "No category", "Image Src": f"{CDN}spare.jpg"},
    )
    done = import_products(path, images, tmp_path / "catalog.csv")
    assert sorted(rows(tmp_path / "catalog.csv")) == [
        ("images/boot.webp", "Shoes > Boots", "boot", "Boot"),
        ("images/tee back.png", "T-Shirts", "tee", 'Größe, "M"'),
        ("images/tee-front.jpg", "T-Shirts", "tee", 'Größe, "M"'),
        ("images/tee-red.jpg", "T-Shirts", "tee", 'Größe, "M"'),
    ]
    assert (done.system, done.photos, done.products) == ("Shopify", 4, 2)
    assert done.categories == {"Shoes > Boots": 1, "T-Shirts": 3}
    assert done.missing == (f"hat: {CDN}hat.jpg?v=3",) and done.ambiguous == () == done.shared
    assert done.without_photo == ("card",) and done.without_category == ("odd",)
    assert stat.S_IMODE((tmp_path / "catalog.csv").stat().st_mode) == 0o600


def test_shopifys_newer_column_names(tmp_path: Path, images: Path) -> None:
    put(images, "a.jpg", "b.jpg", "c.jpg")
    path = export(
        tmp_path,
        SHOPIFY_NEW,
        {"Title": "Tee", "URL handle": "tee", "Type": "Tops", "Product image URL": f"{CDN}a.jpg?v=1"},
        {"URL handle": "tee", "Variant image URL": f"{CDN}b.jpg"},
        {"Title": "Cap", "URL handle": "cap", "Product category": "Hats", "Product image URL": f"{CDN}c.jpg"},
    )
    import_products(path, images, tmp_path / "catalog.csv")
    assert [row[1:] for row in rows(tmp_path / "catalog.csv")] == [
        ("Tops", "tee", "Tee"),
        ("Tops", "tee", "Tee"),
        ("Hats", "cap", "Cap"),
    ]


# WooCommerce


def test_woocommerce(tmp_path: Path, images: Path) -> None:
    put(
        images,
        "2017/12/vneck-2.jpg",
        "2017/12/green, dark.jpg",
        "2018/01/hoodie.jpg",
        "2017/12/blue.jpg",
        "cap.jpg",
    )
    path = export(
        tmp_path,
        WOOCOMMERCE,
        {
            "ID": "44",
            "Type": "variable",
            "SKU": "woo-vneck",
            "Name": "V-Neck",
            "Categories": "Sale, Clothing > Tshirts > V, Clothing > Tshirts",
            "Images": f"{UPLOADS}2017/12/vneck-2.jpg, {UPLOADS}2017/12/green\\, dark.jpg",
        },
        {"ID": "76", "Type": "variation", "SKU": "woo-vneck-blue", "Name": "V-Neck - Blue", "Parent": "woo-vneck",
         "Images": f"{UPLOADS}2017/12/blue.jpg"},
        {"ID": "45", "Type": "variable", "Name": "Hoodie", "Categories": "Clothing > Hoodies\\, warm"},
        {"ID": "79", "Type": "variation, virtual", "SKU": "h-red", "Parent": "id:45",
         "Images": f"{UPLOADS}2018/01/hoodie.jpg"},
        {"ID": "60", "Type": "simple, downloadable", "SKU": "cap", "Name": "Cap", "Categories": "Uncategorized",
         "Images": f"{UPLOADS}2019/05/cap.jpg"},
        {"ID": "90", "Type": "variation", "Parent": "gone", "Images": f"{UPLOADS}x.jpg"},
    )  # fmt: skip
    done = import_products(path, images, tmp_path / "catalog.csv")
    assert rows(tmp_path / "catalog.csv") == [
        ("images/2017/12/vneck-2.jpg", "Clothing > Tshirts > V", "woo-vneck", "V-Neck"),
        ("images/2017/12/green, dark.jpg", "Clothing > Tshirts > V", "woo-vneck", "V-Neck"),
        ("images/2017/12/blue.jpg", "Clothing > Tshirts > V", "woo-vneck", "V-Neck"),
        ("images/2018/01/hoodie.jpg", "Clothing > Hoodies, warm", "id:45", "Hoodie"),
        ("images/cap.jpg", "Uncategorized", "cap", "Cap"),
    ]
    assert done.system == "WooCommerce" and done.products == 3 and done.without_category == ("gone",)


def test_a_variation_may_come_before_its_product(tmp_path: Path, images: Path) -> None:
    put(images, "a.jpg")
    path = export(
        tmp_path,
        WOOCOMMERCE,
        {"ID": "2", "Type": "variation", "SKU": "v", "Parent": "id:1", "Images": "https://x.example/a.jpg"},
        {"ID": "1", "Type": "variable", "SKU": "p", "Name": "P", "Categories": "C"},
    )
    import_products(path, images, tmp_path / "catalog.csv")
    assert rows(tmp_path / "catalog.csv") == [("images/a.jpg", "C", "p", "P")]


# The catalog that comes of it


def test_the_catalog_is_one_that_hanse_reads(tmp_path: Path, images: Path) -> None:
    put(images, "a/1.png", "a/2.png", 'b,\n"c".png')
    path = export(
        tmp_path,
        SHOPIFY,
        {"Handle": "p1", "Title": "=1+1", "Type": "Shirts", "Image Src": "https://x.example/1.png"},
        {"Handle": "p1", "Image Src": "https://x.example/2.png"},
        {"Handle": "p2", "Type": "Boots", "Image Src": "https://x.example/" + quote('b,\n"c".png')},
    )
    import_products(path, images, tmp_path / "catalog.csv")
    labels = LabelMap(Taxonomy(classes=("Shirt", "Boot")), {"Shirts": "Shirt", "Boots": "Boot"})
    catalog = Catalog.load(tmp_path / "catalog.csv", labels, holdout_key=bytes(16), holdout_fraction=0.1)
    assert catalog.problems == () and catalog.unmapped == {}
    assert [(record.label, record.sku) for record in catalog.records] == [(0, "p1"), (0, "p1"), (1, "p2")]


def test_a_photo_of_several_products_is_listed_once(tmp_path: Path, images: Path) -> None:
    put(images, "a.jpg")
    path = export(
        tmp_path,
        SHOPIFY,
        {"Handle": "one", "Type": "T", "Image Src": f"{CDN}a.jpg?v=1"},
        {"Handle": "one", "Image Src": f"{CDN}a.jpg?v=2"},
        {"Handle": "two", "Type": "T", "Image Src": f"{CDN}a.jpg?v=1"},
    )
    done = import_products(path, images, tmp_path / "catalog.csv")
    assert rows(tmp_path / "catalog.csv") == [("images/a.jpg", "T", "one", "")]
    assert done.shared == (f"two: {CDN}a.jpg?v=1, listed for one",)


def test_where_the_list_may_lie(tmp_path: Path, images: Path) -> None:
    put(images, "deep/a.jpg")
    path = export(tmp_path, SHOPIFY, {"Handle": "h", "Type": "T", "Image Src": f"{CDN}a.jpg"})
    import_products(path, images, images / "inside.csv")
    assert rows(images / "inside.csv") == [("deep/a.jpg", "T", "h", "")]
    for wrong in (tmp_path / "other" / "catalog.csv", images / "deep" / "catalog.csv"):
        wrong.parent.mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"expected in .*images or in a folder above it"):
            import_products(path, images, wrong)
        assert not wrong.exists()
    (tmp_path / "catalog.csv").write_text("mine")
    with pytest.raises(ConfigError, match="there is a file already"):
        import_products(path, images, tmp_path / "catalog.csv")
    (tmp_path / "link.csv").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="there is a file already"):
        import_products(path, images, tmp_path / "link.csv")
    assert (tmp_path / "catalog.csv").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    (tmp_path / "far").symlink_to(images)
    import_products(path, tmp_path / "far", tmp_path / "through.csv")
    assert rows(tmp_path / "through.csv") == [("images/deep/a.jpg", "T", "h", "")]


# Matching


def found(folder: Path, address: str) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in LocalPhotos(folder).find(address)]


@pytest.mark.parametrize(
    ("local", "address", "matches"),
    [
        ("shoe.jpg", "https://x.example/a/shoe.jpg", True),
        ("shoe.jpg", "https://x.example/a/shoe.jpg?v=1700&width=100#top", True),
        ("shoe.jpg", "//x.example/shoe.jpg", True),
        ("shoe.jpg", "shoe.jpg", True),
        ("Shoe.JPG", "https://x.example/shoe.jpg", True),
        ("Schön ß.jpg", "https://x.example/" + quote(unicodedata.normalize("NFD", "schön ß.jpg")), True),
        ("a+b%.jpg", "https://x.example/a+b%25.jpg", True),
        ("shoe.jpg", "https://x.example/shoe-1024x768.jpg", True),
        ("shoe-300x300.jpg", "https://x.example/shoe.jpg", True),
        ("shoe.jpg", "https://x.example/shoe-scaled.jpg", True),
        ("shoe.jpg", "https://x.example/shoe_1024x1024.jpg?v=2", True),
        ("shoe.jpg", "https://x.example/shoe_x800.jpg", True),
        ("shoe.jpg", "https://x.example/shoe_600x600_crop_center@2x.jpg", True),
        ("shoe_grande.jpg", "https://x.example/shoe.jpg", True),
        ("shoe-1.jpg", "https://x.example/shoe.jpg", False),
        ("shoe.png", "https://x.example/shoe.jpg", False),
        ("poster-30x40.jpg", "https://x.example/poster-50x70.jpg", False),
        ("-30x40.jpg", "https://x.example/.jpg", False),
        ("shoe.jpg", "https://x.example/shoe.jpg/", True),
        ("shoe.jpg", "https://x.example/", False),
        ("shoe.jpg", "", False),
        ("shoe.jpg", "https://[::1/shoe.jpg", False),
        ("shoe.jpg", "https://x.example/a%2Fshoe.jpg", False),
        ("shoe.jpg", "https://x.example/shoe.jpg%00", False),
        ("shoe.jpg", "https://x.example/?shoe.jpg", False),
    ],
)
def test_an_address_finds_its_file(images: Path, local: str, address: str, matches: bool) -> None:
    put(images, local, "other.jpg")
    assert found(images, address) == ([local] if matches else [])


def test_the_very_name_goes_before_a_size(images: Path) -> None:
    put(images, "a-30x40.jpg", "a.jpg", "a-50x70.jpg", "b-10x10.jpg", "b-20x20.jpg")
    assert found(images, "https://x.example/a-30x40.jpg") == ["a-30x40.jpg"]
    assert found(images, "https://x.example/a.jpg") == ["a.jpg"]
    assert found(images, "https://x.example/a-99x99.jpg") == ["a.jpg"]
    assert found(images, "https://x.example/b.jpg") == ["b-10x10.jpg", "b-20x20.jpg"]


def test_folders_decide_between_files_of_one_name(tmp_path: Path, images: Path) -> None:
    put(images, "2017/12/1.jpg", "2018/12/1.jpg", "2018/1.jpg", "x/2.jpg", "y/2.jpg")
    assert found(images, f"{UPLOADS}2017/12/1.jpg") == ["2017/12/1.jpg"]
    assert found(images, f"{UPLOADS}2018/12/1.jpg") == ["2018/12/1.jpg"]
    assert found(images, f"{UPLOADS}12/1.jpg") == ["2017/12/1.jpg", "2018/12/1.jpg"]
    path = export(
        tmp_path,
        SHOPIFY,
        {"Handle": "h", "Type": "T", "Image Src": f"{CDN}2.jpg"},
        {"Handle": "g", "Type": "T", "Image Src": f"{UPLOADS}2017/12/1.jpg"},
    )
    done = import_products(path, images, tmp_path / "catalog.csv")
    assert done.ambiguous == (f"h: {CDN}2.jpg",) and done.photos == 1


def test_namesakes_without_number_are_ambiguous(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_export, "MAX_NAMESAKES", 2)
    put(images, "a/1.jpg", "b/1.jpg", "c/1.jpg")
    assert len(found(images, "https://x.example/a/1.jpg")) == 3


def test_links_hidden_files_and_odd_names_are_left_out(tmp_path: Path, images: Path) -> None:
    put(tmp_path, "private/secret.jpg")
    put(images, "a.jpg", ".hidden.jpg", ".git/b.jpg", " spaced.jpg", "bad\udcff.jpg", "bad\udcfe/c.jpg")
    (images / "secret.jpg").symlink_to(tmp_path / "private" / "secret.jpg")
    (images / "linked").symlink_to(tmp_path / "private")
    (images / "loop").symlink_to(images)
    for name in ("secret.jpg", ".hidden.jpg", "b.jpg", "%20spaced.jpg", "bad%FF.jpg", "c.jpg"):
        assert found(images, f"https://x.example/{name}") == []
    assert found(images, "https://x.example/a.jpg") == ["a.jpg"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=60)
    | st.sampled_from(["../secret.jpg", "..%2Fsecret.jpg", "%2e%2e/secret.jpg", "..\\secret.jpg"])
)
def test_no_address_leads_out_of_the_folder(tmp_path_factory: pytest.TempPathFactory, address: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "kept"
    if not folder.exists():
        put(folder, "inside/a.jpg", "inside/secret-1x1.jpg")
        put(folder.parent, "secret.jpg")
    for prefix in ("", "https://x.example/", "file:///", "/"):
        for path in LocalPhotos(folder / "inside").find(prefix + address):
            assert path.parent == folder / "inside" and not path.is_symlink()


NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=40
).filter(lambda name: name == name.strip() and not name.startswith(".") and len(name.encode()) < 200)


@settings(deadline=None, max_examples=60)
@given(
    name=NAMES,
    suffix=st.sampled_from([".jpg", ".PNG", ".webp"]),
    query=st.sampled_from(["", "?v=12", "#x", "?a=b/c.jpg"]),
)
def test_any_name_is_found_by_its_own_address(
    tmp_path_factory: pytest.TempPathFactory, name: str, suffix: str, query: str
) -> None:
    folder = tmp_path_factory.mktemp("named")
    (folder / f"{name}{suffix}").touch()
    expected = [folder / f"{name}{suffix}"]
    if "\\" in name:
        expected = []
    assert (
        LocalPhotos(folder).find(f"https://x.example/files/{quote(name + suffix, safe='')}{query}")
        == expected
    )


# Hostile exports


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ":1: found the columns '', expected a product export of Shopify"),
        ("path,label\na.jpg,x\n", ":1: found the columns 'path, label'"),
        ("ID;Type;SKU;Name;Kategorien;Bilder\n", "with English column names, with commas"),
        ("Handle,Image Src,Handle\n", ":1: found the column 'handle' twice"),
        ("Handle,Image Src\na,b,c\n", ":2: found 3 fields, expected 2"),
        ("Handle,Image Src\n\na\n", ":3: found 1 fields, expected 2"),
        ("Handle,Image Src\n ,b\n", ":2: the handle is empty"),
        ("SKU,Name,Categories,Images\n,x,y,z\n", ":2: ID and SKU are empty"),
        ('Handle,Image Src\na,"b\n', ":2: not CSV"),
        ('Handle,Image Src\na,"b"c\n', ":2: not CSV"),
        (b"Handle,Image Src\na,\xff\n", ":2: not UTF-8"),
        ("Handle,Image Src\n" + "x" * 501 + ",b\n", ":2: found a sku or handle of 501 characters"),
        ("Handle,Image Src,Type\na,b," + "x" * 501 + "\n", ":2: found a category of 501 characters"),
        ("Handle,Image Src\na\0,b\n", ":2: found a sku or handle of 2 characters"),
        ("Handle,Image Src\na," + "x" * 140_000 + "\n", ":2: not CSV (field larger than field limit"),
        ("Handle,Image Src\na," + "x" * (1 << 20) + "\n", ":2: longer than 1048576 bytes"),
        ('Handle,Image Src\na,"' + "x\n" * 100_000, "not CSV (field larger than field limit"),
        ("Handle,Image Src\na,https://x.example/none.jpg\n", "found none of its photos in"),
        ("Handle,Image Src,Type\na,,T\n", "the first is missing, as no product has one"),
    ],
)
def test_a_malformed_export_is_refused_by_line(
    tmp_path: Path, images: Path, text: str | bytes, words: str
) -> None:
    path = tmp_path / "export.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CatalogError) as caught:
        import_products(path, images, tmp_path / "catalog.csv")
    assert str(caught.value).startswith(str(path)) and words in str(caught.value)
    assert not (tmp_path / "catalog.csv").exists()


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ("MAX_ROWS", ":4: more than 2 rows"),
        ("MAX_PHOTOS", ":4: more than 2 photos"),
        ("MAX_BYTES", "more than 2 bytes"),
    ],
)
def test_exports_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, words: str) -> None:
    path = export(
        tmp_path, ["Handle", "Image Src"], *({"Handle": "h", "Image Src": f"{n}.jpg"} for n in range(3))
    )
    monkeypatch.setattr(product_export, bound, 2)
    with pytest.raises(CatalogError, match=words):
        read_export(path)


def test_folders_are_bounded_and_must_be_there(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(images, "a.jpg", "b.jpg", "c.jpg")
    path = export(tmp_path, SHOPIFY, {"Handle": "h"})
    with pytest.raises(CatalogError, match="nowhere: found no folder"):
        import_products(path, tmp_path / "nowhere", tmp_path / "catalog.csv")
    with pytest.raises(CatalogError, match=r"none\.csv: cannot be read"):
        import_products(tmp_path / "none.csv", images, tmp_path / "catalog.csv")
    monkeypatch.setattr(product_export, "MAX_ROWS", 2)
    with pytest.raises(CatalogError, match="found more than 2 files"):
        LocalPhotos(images)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    columns=st.sampled_from(["Handle,Image Src,Title,Type", "ID,Type,SKU,Name,Categories,Images,Parent"]),
    body=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(st.lists(st.sampled_from(["", "a", "id:1", "1", "variation", "a.jpg, b\\,c.jpg", "'=x", '"q"', "A > B"]),
                        min_size=4, max_size=7), max_size=8)
      .map(lambda rows: "\r\n".join(",".join(row) for row in rows).encode()),
)  # fmt: skip
def test_whatever_an_export_holds_it_is_read_or_refused(tmp_path: Path, columns: str, body: bytes) -> None:
    path = tmp_path / "export.csv"
    path.write_bytes(columns.encode() + b"\r\n" + body)
    try:
        _, products = read_export(path)
    except CatalogError as error:
        assert str(error).startswith(str(path))
    else:
        assert len({product.sku for product in products}) == len(products)
        for product in products:
            assert product.sku and len(product.category) <= 500 and len(product.title) <= 500
            assert "\n" not in product.sku + product.category + product.title


# The command


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["hanse-client", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return run


def test_the_command(run: Callable[..., Result], tmp_path: Path, images: Path) -> None:
    put(images, "a.jpg", "b.jpg")
    export(
        tmp_path,
        SHOPIFY,
        {"Handle": "tee", "Type": "Tops [red]", "Image Src": f"{CDN}a.jpg"},
        {"Handle": "tee", "Image Src": f"{CDN}b.jpg"},
        *({"Handle": f"gone-{n}", "Type": "T", "Image Src": f"{CDN}\x1b[2Jgone-{n}.jpg"} for n in range(4)),
        {"Handle": "bare"},
    )
    result = run("import-products", "export.csv", "--images", "images", "--problems", "2")
    assert (result.code, result.err) == (0, "")
    assert "Wrote catalog.csv: 2 photos of 1 product, from a Shopify export." in result.out
    assert "'Tops [red]': 2 photos" in result.out
    assert "Photos that are not in the folder: 4" in result.out and "... and 2 more" in result.out
    assert "\x1b" not in result.out
    assert "Products without a photo: 1\n  bare" in result.out
    assert "Products without a category, left out: 1\n  bare" in result.out
    assert "Name catalog.csv under photos in your configuration" in result.out
    again = run("import-products", "export.csv", "--images", "images")
    assert again.code == 10 and "catalog.csv: there is a file already" in again.err
    bad = run("import-products", "images/a.jpg", "--images", "images", "--out", "new.csv")
    assert bad.code == 14 and "Traceback" not in bad.err
