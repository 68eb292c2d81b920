import socket, threading, time, io
import grpc, httpx, pytest
from PIL import Image
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.recognition_pb2_grpc import RecognitionStub
from .conftest import running, picture
from pathlib import Path
import re

def test_probe(tmp_path: Path) -> None:
    with running(tmp_path, requests=2, streams=1) as served:
        with grpc.insecure_channel(served.authority) as ch:
            h = health_pb2_grpc.HealthStub(ch)
            ws = [h.Watch(health_pb2.HealthCheckRequest(service="")) for _ in range(4)]
            for w in ws:
                try: print("watch", next(iter(w)))
                except grpc.RpcError as e: print("watch", e.code())
            try:
                r = RecognitionStub(ch).Embed(pb.EmbedRequest(photo=picture(1)), metadata=(("authorization", f"Bearer {served.token}"),), timeout=10)
                print("embed ok", len(r.vector))
            except grpc.RpcError as e: print("embed", e.code(), e.details())
            for w in ws: w.cancel()
        # pipelined unread
        stuck = []
        for _ in range(2):
            s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.connect(("127.0.0.1", served.config.serve.port)); s.settimeout(2)
            try:
                for _ in range(60):
                    s.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20)
            except TimeoutError: print("send blocked")
            stuck.append(s)
        time.sleep(3)
        with served.client() as c:
            for wait in (0, 15):
                time.sleep(wait)
                a = c.get("/v1/status"); print("status", a.status_code, a.text[:80])
            for s in stuck: s.close()
            time.sleep(.5)
            print("after", c.get("/v1/status").status_code)
            # errors
            for n in ("NaN","Infinity","1e99999","-1"):
                print(n, c.put("/v1/products/A", json={"title":"x","price":n}).status_code)
            print(c.put("/v1/products/A", content=b'{"price": 1e400}', headers={"content-type":"application/json"}).text[:200])
            print("long cl", end=" ")
            s=socket.create_connection(("127.0.0.1", served.config.serve.port)); s.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer "+served.token.encode()+b"\r\nContent-Type: image/jpeg\r\nContent-Length: "+b"9"*6000+b"\r\n\r\n"); print(s.recv(200)); s.close()
            print(c.put("/v1/products/e%CC%81", json={"title":"n"}).status_code, c.put("/v1/products/%C3%A9", json={"title":"n"}).status_code, [p["sku"] for p in c.get("/v1/products").json()["products"]])
            print(c.put("/v1/products/A%E2%80%AEB", json={}).text)
            print(c.put("/v1/products/Z", json={"title":"Crème\u00a0brûlée"}).text)
            print(c.put("/v1/products/Z", json={"title":"a\u200cb"}).text)
            db = served.config.gallery_path/"gallery.sqlite"
            # damage
            import sqlite3
            k = sqlite3.connect(db); k.execute("BEGIN IMMEDIATE"); k.execute("DROP TABLE rejection"); k.commit(); k.close()
            print("damaged", c.get("/v1/status").text)
            print("told", served.told)
        # page cookie -> key
        with httpx.Client(base_url=served.url) as p:
            p.get(f"/?token={served.token}")
            jar = dict(p.cookies)
        thief = httpx.Client(base_url=served.url, cookies=jar)
        page = thief.get("/product/new").text
        m = re.search(r'name="key" value="([^"]+)"', page); print("key readable by who has the cookie:", bool(m))
        if m:
            r = thief.post("/language", data={"key": m[1], "language":"en","to":"/"}, headers={"Sec-Fetch-Site":"same-origin"})
            print("acts:", r.status_code)
