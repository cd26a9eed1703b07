"""When two formulas have the same value: exact numbers, formulas at points, how a formula is read, and the limits."""

import contextlib
import math
import random
import time
from fractions import Fraction

import pytest

from trl_anytime.rewards import MathReward
from trl_anytime.rewards.verifier.equality import Exact, answers_equal
from trl_anytime.rewards.verifier.grammar import TooLarge
from trl_anytime.rewards.verifier.latex import normalize
from trl_anytime.rewards.verifier.symbolic import Symbolic

# A gold and an answer a line, equal in both directions
EQUAL = r"""
\pi x=2^{300}+1 ;; 2\pi x=2+2^{301}
\pi x+\sqrt2 y=3 ;; 3\sqrt2 y=9-3\pi x
f(x)=x^2+1 ;; f(t)=1+t^2
f(x,y)=x+2y ;; f(a,b)=a+2b
g(n)=\ln n ;; g(x)=\ln x
f(x)=xe^x ;; f(t)=te^t
f(x)=\exp(x) ;; f(t)=e^t
2^{3000}-1 ;; 2\cdot 2^{2999}-1
\frac{100!}{98!} ;; 9900
\frac{1}{2^{500}} ;; 4^{-250}
\binom{2000}{1000} ;; \frac{2000!}{(1000!)^2}
\sqrt{10^{400}} ;; 10^{200}
3^{1000}\cdot 9^{-500} ;; 1
1-\left(\frac{5}{6}\right)^{300} ;; 1-\frac{5^{300}}{6^{300}}
\sqrt{3+2\sqrt2} ;; 1+\sqrt2
\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5} ;; 1
\sum_{k=1}^{100} k ;; 5050
\sum_{k=0}^{n} \binom{n}{k} ;; 2^n
\sum_{k=1}^{n} k^2 ;; \frac{n(n+1)(2n+1)}{6}
\prod_{k=1}^{5} k ;; 120
\lfloor n/2 \rfloor + \lceil n/2\rceil ;; n
\lceil\frac{n}{2}\rceil ;; \lfloor\frac{n+1}{2}\rfloor
\max(a,b) ;; \frac{a+b+|a-b|}{2}
\min(a,b) ;; \frac{a+b-|a-b|}{2}
|x-y| ;; |y-x|
|n-20| ;; |20-n|
\sqrt{x^2} ;; |x|
\gcd(m,n) ;; \gcd(n,m)
\gcd(a,b)\cdot\text{lcm}(a,b) ;; |ab|
(-1)^{n+1} ;; -(-1)^n
(-1)^{2n} ;; 1
\cos(n\pi) ;; (-1)^n
\frac{1-(-1)^n}{2} ;; n \bmod 2
\ln(x^2) ;; 2\ln x
\sqrt{x}\sqrt{y} ;; \sqrt{xy}
\frac{x^2-1}{x-1} ;; x+1
\frac{n!}{(n-2)!} ;; n(n-1)
\binom{n}{3} ;; \frac{n(n-1)(n-2)}{6}
\log_3(9) ;; 2
\log_2(x)+\log_2(y) ;; \log_2(xy)
\cos^2(x)-\sin^2(x) ;; \cos(2x)
\tan^2(x)+1 ;; \sec^2(x)
1/(3y) ;; \frac{1}{3y}
5/(2\pi) ;; \frac{5}{2\pi}
x/(2\sqrt{5}) ;; \frac{x}{2\sqrt5}
2^(1/2) ;; \sqrt2
e^(-3x) ;; \frac{1}{e^{3x}}
3^2 5^3 ;; 1125
2^4 \cdot 3^2 ;; 144
2^4 3^2 7 ;; 1008
cd-ab ;; dc-ba
adx ;; xda
d^3 ;; ddd
log(100) ;; 2
ln(x)/2 ;; \frac{\ln x}{2}
exp(-x) ;; e^{-x}
cbrt(8) ;; 2
abs(-3) ;; 3
abs(x-2) ;; |2-x|
floor(7/2) ;; 3
ceil(7/2) ;; 4
\operatorname{floor}(x) ;; \lfloor x \rfloor
\operatorname{arcosh}(2) ;; \ln(2+\sqrt3)
\operatorname{artanh}(x) ;; \frac12\ln\frac{1+x}{1-x}
\sinh^{-1}(x) ;; \operatorname{arcsinh}(x)
17 \mod 5 ;; 2
17 \bmod 5 ;; 2
\frac{dy}{dx}=2x ;; \frac{dy}{dx}=x+x
3:2 ;; 6:4
1:2:3 ;; 2:4:6
9:05 ;; 09:05
2.5\cdot 10^{-3} ;; 0.0025
3.33333333*10^{-1} ;; \frac13
\sin x\cdot 2 ;; 2\sin x
\ln 3 * 2 ;; \ln 9
\cos 2x ;; 1-2\sin^2 x
\sin\frac{\pi}{6} ;; \frac12
\sin 30^\circ ;; 1/2
\frac{a}{b}/c ;; \frac{a}{bc}
a/b/c ;; \frac{a}{bc}
2\frac12 x ;; 2.5x
-1\frac12 ;; -1.5
\frac{x+y}{2}-\sqrt{xy} ;; \frac{(\sqrt x-\sqrt y)^2}{2}
n^{1000} ;; n^{999}n
1000! ;; 1000\cdot 999!
\frac{e^x-e^{-x}}{2} ;; \sinh x
x^{1/3} ;; \sqrt[3]{x}
\sqrt[3]{-8} ;; -2
\frac{1}{\sqrt{2}+1} ;; \sqrt2-1
a_{n+1}=2a_n ;; 2a_n=a_{n+1}
i^{2022} ;; -1
(1+i)^{10} ;; 32i
\frac{1+i}{1-i} ;; i
e^{2\pi i/3} ;; \frac{-1+i\sqrt3}{2}
0.1+0.2 ;; 0.3
\log_{2}{8} ;; 3
\frac{\log 8}{\log 2} ;; 3
\sqrt{2}^2 ;; 2
2^{-400} ;; \frac{1}{2^{400}}
e^{-1000}+1 ;; 1+\frac{1}{e^{1000}}
\frac{7^{101}-7}{6} ;; 7\cdot\frac{7^{100}-1}{6}
\lfloor\sqrt{99}\rfloor ;; 9
\lfloor\log_2 8\rfloor ;; 3
\lfloor\sqrt{10^{100}}\rfloor ;; 10^{50}
\int_0^1 x\,dx ;; \frac12
\lim_{x\to 0}\frac{\sin x}{x} ;; 1
\frac{\pi^2}{6} ;; \sum_{n=1}^{\infty}\frac{1}{n^2}
\sum_{k=1}^{10000} k ;; 50005000
2\pi r(r+h) ;; 2\pi r^2+2\pi rh
P(1+r)^t ;; P(r+1)^t
x!(n-x)! ;; (n-x)!x!
|x||y| ;; |xy|
\frac{|x|}{x} ;; \frac{x}{|x|}
\sqrt{x-100} ;; (x-100)^{1/2}
\sqrt{1-x^2} ;; \sqrt{(1-x)(1+x)}
\arcsin x + \arccos x ;; \frac{\pi}{2}
\frac{1}{1+\frac{1}{x}} ;; \frac{x}{x+1}
n(n+1)/2 ;; \frac{n(n+1)}{2}
(n+1)!/n! ;; n+1
\binom{n}{k} ;; \binom{n}{n-k}
\binom{n}{k} ;; \frac{n!}{k!(n-k)!}
\frac{(2n)!}{n!n!} ;; \binom{2n}{n}
2^{n+1}-2 ;; \sum_{k=1}^{n}2^k
\frac{n(n-1)(n-2)}{6} ;; \frac{n!}{3!(n-3)!}
e^{\ln x} ;; x
\log_4 x ;; \frac{\log_2 x}{2}
\sqrt[4]{x^2} ;; \sqrt{|x|}
\frac{\sqrt{a^2b}}{b} ;; \frac{|a|}{\sqrt b}
3x - \frac{x}{2} ;; 2.5x
\tan x ;; \frac{\sin x}{\cos x}
\cot(\theta) ;; \frac{1}{\tan\theta}
\sin(\alpha+\beta) ;; \sin\alpha\cos\beta+\cos\alpha\sin\beta
\cosh^2(x) - \sinh^2(x) ;; 1
\sin^2 x\cos^2 x ;; \frac{\sin^2(2x)}{4}
2\cos^2\theta-1 ;; \cos 2\theta
\frac12 \sin 2x ;; \sin x\cos x
(x+1)(x-1)/x ;; x-\frac1x
-x^2 ;; -(x^2)
(-x)^2 ;; x^2
2^{-n} ;; (1/2)^n
\left(\frac{2}{3}\right)^{n-1} ;; \frac{2^{n-1}}{3^{n-1}}
\lfloor x+1\rfloor ;; \lfloor x\rfloor+1
\lceil x \rceil ;; -\lfloor -x\rfloor
\lfloor n/2\rfloor ;; \frac{2n-1+(-1)^n}{4}
n \bmod 2 ;; n-2\lfloor n/2\rfloor
\max(x,-x) ;; |x|
\max(0,x) ;; \frac{x+|x|}{2}
\text{lcm}(n,6)\gcd(n,6) ;; 6|n|
\gcd(n,n+1) ;; 1
\gcd(2n,2m) ;; 2\gcd(n,m)
\operatorname{sgn}(x)|x| ;; x
|2x-4| ;; 2|x-2|
|ab| ;; |a||b|
||x|| ;; |x|
\sqrt{x^2+2x+1} ;; |x+1|
x^{0.5} ;; \sqrt x
1.5\times10^{3} ;; 1500
\frac{3}{4}\pi r^3 ;; 0.75\pi r^3
4/3\pi r^3 ;; \frac43\pi r^3
\frac{4}{3}\pi ;; 4\pi/3
3/4x ;; \frac{3x}{4}
2\cdot 3^{n} ;; 2*3^n
2^n 3^n ;; 6^n
2^3 x ;; 8x
5!/3! ;; 20
\frac{10!}{5!5!} ;; 252
10\binom{5}{2} ;; 100
(\frac{1}{2})(3) ;; 1.5
\ln\frac{a}{b} ;; \ln a-\ln b
\ln(ab) ;; \ln a + \ln b
\log_a(b) ;; \frac{\ln b}{\ln a}
e^{x+y} ;; e^xe^y
\exp(2\ln 3) ;; 9
exp(x^2) ;; e^{x^2}
sqrt(2)/2 ;; \frac{1}{\sqrt2}
sin(pi/6) ;; 0.5
cos(2*pi/3) ;; -1/2
arctan(1) ;; \pi/4
log_2(8) ;; 3
log2(8) ;; 3
log10(100) ;; 2
(x^2-1)/(x+1) ;; x-1
x^(2/3) ;; \sqrt[3]{x^2}
(a+b)^(n-1) ;; (a+b)^{n-1}
e^(i*pi) ;; -1
2**10 ;; 1024
x**2/4 ;; 0.25x^2
mod(17,5) ;; 2
dv-du ;; -(du-dv)
\frac{dk}{2} ;; 0.5dk
kd\pi ;; \pi dk
d(a+b) ;; ad+bd
\frac{\pi d^2}{4} ;; \pi(d/2)^2
\frac{d^2V}{dr^2}=2 ;; \frac{d^2V}{dr^2}=1+1
x_1+x_2 ;; x_2+x_1
\vec{a}+2\vec{b} ;; 2\vec{b}+\vec{a}
\overline{z}+z ;; z+\overline{z}
\alpha\beta ;; \beta\alpha
\frac{1}{2}n^2+\frac12n ;; \frac{n(n+1)}{2}
f(x)+g(x) ;; g(x)+f(x)
2f(x) ;; f(x)+f(x)
P(A)+P(B) ;; P(B)+P(A)
\prod_{k=1}^{n} k ;; n!
\sum_{i=1}^{n} i ;; \sum_{j=1}^{n} j
\sum_{n=0}^{\infty} \frac{1}{2^n} ;; 2
\frac{2023\cdot 2024}{2} ;; \sum_{k=1}^{2023}k
1-\frac{1}{2023!} ;; \frac{2023!-1}{2023!}
2^{2023}+2^{2023} ;; 2^{2024}
\frac{2^{2024}-1}{3} ;; \frac{4^{1012}-1}{3}
(\sqrt2)^{2000} ;; 2^{1000}
\sqrt{2^{2000}} ;; 2^{1000}
\left(\frac{1+\sqrt5}{2}\right)^2 ;; \frac{3+\sqrt5}{2}
\frac{(1+\sqrt5)^{10}-(1-\sqrt5)^{10}}{2^{10}\sqrt5} ;; 55
\lfloor \pi^{10}\rfloor ;; 93648
\lfloor (2+\sqrt3)^{10}\rfloor ;; 524173
10^{100} \bmod 7 ;; 4
2^{1000}\bmod 10 ;; 6
7^{10^{9}}\bmod 10 ;; 1
(-2)^{10^9+1} \bmod 7 ;; 3
\gcd(2^{100}-1,2^{60}-1) ;; 2^{20}-1
\sin 1^\circ ;; \cos 89^\circ
\tan 15^\circ ;; 2-\sqrt3
4\arctan\frac15-\arctan\frac1{239} ;; \frac\pi4
i^i ;; e^{-\pi/2}
|3+4i| ;; 5
\sqrt{-4} ;; 2i
\operatorname{lcm}(4,6) ;; 12
\lcm(1,2,3,4) ;; 12
\max\{3,5\} ;; 5
7! ;; 5040
\frac{0}{5} ;; 0
0^0+1 ;; 2
4:6 ;; 2:3
\sqrt2:1 ;; 2:\sqrt2
x:2x ;; 1:2
10:20:30 ;; 1:2:3
1.41421356 ;; \sqrt{2}
\min(2^{100},3^{60}) ;; 3^{60}
2\begin{pmatrix}\frac13\\1\end{pmatrix} ;; \begin{pmatrix}\frac23\\2\end{pmatrix}
\begin{pmatrix}2&0\\0&1\end{pmatrix}^{300} ;; \begin{pmatrix}2^{300}&0\\0&1\end{pmatrix}
[0,5]\cap[2,9] ;; [2,5]
\sqrt4>1 ;; 2>1
\int_0^1 x^2 dx ;; \frac13
\sum_{k=0}^\infty\frac{1}{k!} ;; e
2f(2)=6 ;; f(2)=3
f(1)+f(2)=3 ;; f(2)+f(1)=3
a_{n+1}-2a_n=1 ;; a_{n+1}=2a_n+1
(1,2)\cup[5,\sqrt{30}) ;; [5,\sqrt{30})\cup(1,2)
f^{-1}(x)=2x ;; f^{-1}(t)=2t
f_1(x)=x ;; f_1(t)=t
f'(x)=2x ;; f'(t)=2t
f(x)=3 ;; f(t)=3
P(X)=X^2 ;; P(x)=x^2
5 g ;; 5\text{ grams}
10 s ;; 10\text{ seconds}
factorial(5) ;; 120
xsin(x) ;; x\sin x
xlnx ;; x\ln x
\operatorname{tg} x ;; \tan x
\operatorname{arccosh}(x) ;; \operatorname{arcosh} x
arsinh 1 ;; \ln(1+\sqrt2)
-1 \bmod 5 ;; 4
-(1 \bmod 5) ;; -1
10-7 \bmod 5 ;; 8
1.2x10^5 ;; 120000
"yes" ;; Yes
\overrightarrow{AB} ;; \vec{AB}
\hat{x} ;; \widehat{x}
\triangle{ABC} ;; △ABC
2\hat{\mathbf{i}}+3\hat{\mathbf{j}} ;; 2\mathbf{i}+3\mathbf{j}
\text{All reals except }2 ;; \mathbb{R}\setminus\{2\}
x ≡ 3 (mod 7) ;; x\equiv 10\pmod 7
25\text{ N/m} ;; 25\ \mathrm{N/m}
25\text{ N/m} ;; 25\,\mathrm{N\cdot m^{-1}}
25\text{ N/m} ;; 25\text{ newtons per meter}
25\text{ N m} ;; 25\,\mathrm{N\cdot m}
25\text{ kW} ;; 25\text{ kilowatts}
25\text{ kW} ;; 25
25\text{ Pa} ;; 25\text{ pascals}
25\text{ K} ;; 25\text{ kelvin}
25\,\mathrm{mA} ;; 25\text{ milliamperes}
25\text{ J/(kg K)} ;; 25
3 \pmod 7 ;; x\equiv 10\pmod 7
5\text{ (mod }7) ;; 5\pmod{7}
5 (mod 7) ;; 12 \pmod 7
"""

DIFFERENT = r"""
\pi x=2^{300} ;; \pi x=2^{300}+1
x+2^{200}=0 ;; x+2^{200}+1=0
y=|x| ;; y=x
y=\max(x,0) ;; y=x
|x-30|=y ;; x-30=y
f(x)=x^2 ;; f(t)=t^3
f(x)=x+t ;; f(t)=t+x
f(x)=x^2 ;; g(t)=t^2
f(x,y)=x-y ;; f(y,x)=x-y
f(x)=xe^x ;; f(t)=te^x
2^{3000}-1 ;; 2^{3000}
3^{2000} ;; 3^{2000}+2
\frac{1}{500!} ;; \frac{1}{501!}
\frac{1}{500!} ;; 0
\binom{1000}{500} ;; \binom{1000}{499}
\binom{1500}{700}+1 ;; \binom{1500}{700}
\left(\frac{1}{2}\right)^{300} ;; 0
1+10^{-200} ;; 1
\sqrt{10^{200}+1} ;; 10^{100}
\sqrt{10^{2000}+1} ;; 10^{1000}
e^{-1000}+1 ;; 1
e^{-300} ;; 0
\cos(10^{-100}) ;; 1
\pi+10^{-80} ;; \pi
\sqrt2+2^{-300} ;; \sqrt2
0.99999999999999999999999999999999999999999999999999999 ;; 1
\left(1-\frac{1}{10^{60}}\right)^2 ;; 1
\frac{10^{90}+1}{10^{90}} ;; 1
2^{2000}\cdot\pi ;; (2^{2000}+1)\pi
1000!+\sqrt2 ;; 1000!+\sqrt3
7^{777} ;; 7^{777}-7
\lfloor\frac{n}{2}\rfloor ;; \lfloor\frac{n}{3}\rfloor
\lfloor\frac{n}{2}\rfloor ;; \lceil\frac{n}{2}\rceil
\lfloor x \rfloor ;; x
\lfloor x \rfloor ;; \lceil x\rceil-1
\lfloor\sqrt{n}\rfloor ;; \lfloor\sqrt{n-1}\rfloor
n+\lfloor n/100\rfloor ;; n
\lfloor n/1000\rfloor ;; 0
n\bmod 7 ;; n
n\bmod 12 ;; n\bmod 6
n\bmod 50 ;; n\bmod 100
xy ;; |xy|
x ;; |x|
x-y ;; |x-y|
|x-50| ;; x-50
|x-500| ;; 500-x
|x-0.01| ;; x-0.01
\sqrt{(x-20)^2} ;; 20-x
\sqrt{(x-20)^2} ;; x-20
x^3 ;; |x|^3
\max(a,b) ;; a
\max(a,0) ;; a
\max(x,y,z) ;; \max(x,y)
\min(x,100) ;; x
\max(1,n-100) ;; 1
\max(n,5) ;; n
\min(n,1000) ;; n
\gcd(n,12) ;; \gcd(n,6)
\gcd(n,9) ;; \gcd(n,3)
\gcd(n,64) ;; \gcd(n,32)
\gcd(m,n) ;; 1
\text{lcm}(m,n) ;; mn
(-1)^n ;; 1
(-1)^n ;; -1
(-1)^n ;; (-1)^{n+1}
(-1)^{n(n+1)/2} ;; (-1)^n
\cos(n\pi) ;; 1
n! ;; n^2
n! ;; n^n
(2n)! ;; 2n!
x^{500} ;; x^{502}
x^{500} ;; x^{500}+1
n^{1500}-1 ;; n^{1500}
x^{99999} ;; x^{100000}
2^{n} ;; 2^{n}+10^{-50}
\pi x ;; \pi x+10^{-50}
\pi x ;; (\pi+10^{-60})x
8:00 ;; 9:00
11:59 ;; 11:58
6:15 ;; 6:16
00:00 ;; 12:00
1:30 ;; 1:31
3:2 ;; 2:3
1:2:3 ;; 1:3:2
1:2:3 ;; 1:2
\frac{0}{0} ;; \frac{1-1}{0}
\frac{0}{0} ;; 1
\frac{1}{0} ;; \frac{2}{0}
\ln 0 ;; \ln(1-1)
\frac{x}{0} ;; \frac{y}{0}
\tan 90^\circ ;; \cot 0
\sin(2x) ;; \sin x\cdot 2
\ln 2\cdot 3 ;; \ln 6
\cos x * 3 ;; \cos 3x
\log 2 \times 5 ;; \log 10
\sin x\cdot\sin x ;; \sin(x\sin x)
\log_2(8) ;; \log_8(2)
\sin^2(x) ;; \sin(2x)
\sin^2(x) ;; \sin x
\cos^2(x) ;; \cos(x^2)
1/(2x) ;; \frac{1}{2}x
1/(4\pi) ;; \frac{\pi}{4}
10^(-3) ;; -1000
2^(1/3) ;; \frac{2}{3}
e^(2x) ;; e^2x
2^2 3^3 ;; 2^3 3^2
dp-cq ;; dq-cp
ad-bc ;; ab-dc
d^2 ;; 2d
log(5) ;; ln(5)
log(5) ;; 5
exp(2) ;; 2e
cbrt(8) ;; 8
abs(x) ;; x
floor(x) ;; ceil(x)
\operatorname{arsinh}(1) ;; \operatorname{arcosh}(1)
\gcd(830,450) ;; 450
7 \mod 3 ;; 3
\frac{dv}{du}=v ;; \frac{du}{dv}=v
\frac{dy}{dx}=x ;; \frac{dx}{dy}=x
\frac{dP}{dt}=P ;; \frac{dt}{dP}=P
dy/dx=y ;; dx/dy=y
\frac{d^2y}{dx^2} ;; \frac{dy}{dx}
2.314814814 \times 10^{-3} ;; \frac{1}{43}
1.41421357 ;; \sqrt2
f(x+1) ;; f(x)+1
a_{n+1} ;; a_n+1
a_{n-1} ;; a_{n-2}
\sum_{k=1}^{n} k ;; \sum_{k=1}^{n-1} k
\sum_{k=1}^{n} k ;; \frac{n^2}{2}
i^{2023} ;; i
\lfloor\sqrt{10^{100}-1}\rfloor ;; 10^{50}
\lfloor 1-10^{-100}\rfloor ;; 1
e^{\pi\sqrt{163}} ;; 262537412640768744
5\frac13 ;; \frac53
2\sqrt3 x ;; 2\sqrt{3x}
\frac{a}{bc} ;; a/b*c
\sqrt{x} ;; \sqrt{-x}
\sqrt{x^2+y^2} ;; x+y
x^0.5 ;; x^5
\frac{x^2-1}{x-1} ;; x-1
\infty ;; -\infty
\sqrt{x-100} ;; \sqrt{x+100}
\arcsin x ;; \arccos x
\sqrt{x} ;; \sqrt[3]{x}
x^{2/3} ;; x^{3/2}
\binom{n}{k} ;; \binom{n}{k+1}
n! ;; (n+1)!/n
\frac{n!}{2} ;; n!
2^{n} ;; 2^{n-1}
2^n ;; n^2
x^{50}-x^{48} ;; 0
(x-1)(x-2)(x-3) ;; 0
x(x-1)(x+1) ;; x
n(n-1)(n-2)(n-3)n! ;; 0
\lfloor x\rfloor ;; \lfloor x+\frac12\rfloor
\lfloor 2x\rfloor ;; 2\lfloor x\rfloor
\lfloor x\rfloor+\lfloor y\rfloor ;; \lfloor x+y\rfloor
\lfloor\frac{n+1}{3}\rfloor ;; \lfloor\frac{n+2}{3}\rfloor
\lfloor\sqrt[3]{n}\rfloor ;; \lfloor\sqrt{n}\rfloor
\lfloor\log_2 n\rfloor ;; \lceil\log_2 n\rceil
\lfloor n/7\rfloor+\lfloor n/49\rfloor ;; \lfloor n/7\rfloor
mn-\lfloor m/2\rfloor ;; mn-\lfloor n/2\rfloor
n^2 \bmod 4 ;; n \bmod 4
n \bmod 3 ;; n \bmod 9
2n\bmod 11 ;; n\bmod 11
|x|+|y| ;; |x+y|
|x| ;; -x
|x|-|y| ;; |x-y|
|x-1|+|x-2| ;; 2x-3
|x^2-100| ;; x^2-100
|x^2-100| ;; 100-x^2
|x-10000| ;; 10000-x
\sqrt{x^4} ;; x|x|
\sqrt{(a-b)^2} ;; a-b
\max(x,y) ;; \min(x,y)
\max(x,y)+\max(y,z) ;; \max(x,z)+y
\max(a,b,c) ;; a+b+c
\max(x^2,x) ;; x^2
\max(n,2) ;; n
\min(n,20)+\max(n,20) ;; n
\gcd(n,10) ;; \gcd(n,5)
\gcd(n,6) ;; \gcd(n,2)
\gcd(a,b,c) ;; \gcd(a,b)
\gcd(n^2,4) ;; \gcd(n,4)
\operatorname{lcm}(n,4) ;; 4n
(-1)^n n ;; n
(-1)^{n^2} ;; (-1)^{n+1}
(-1)^{\lfloor n/2\rfloor} ;; (-1)^n
\cos\frac{n\pi}{2} ;; \cos n\pi
\operatorname{sgn}(x) ;; 1
x\operatorname{sgn}(x) ;; x
\frac{|x|}{x} ;; 1
\sum_{k=1}^{n}k^3 ;; \sum_{k=1}^{n}k^2
\sum_{k=0}^{n}k ;; n^2
\prod_{k=1}^{n}k ;; n^n
x^{2001} ;; x^{2003}
x^{1001}+1 ;; x^{1001}
a^{200}b ;; ab^{200}
3^{n} ;; 3^{n}+1
(1+10^{-45})x ;; x
x+10^{-90} ;; x
e^{x}+10^{-45} ;; e^x
\sin x+10^{-100} ;; \sin x
\frac{2^{2024}-1}{3} ;; \frac{2^{2024}+2}{3}
2023! ;; 2023!+2023
1-\frac{1}{2023!} ;; 1
(\sqrt2)^{2001} ;; 2^{1000}
\sqrt{2^{2000}+1} ;; 2^{1000}
\lfloor (2+\sqrt3)^{10}\rfloor ;; 524174
\lfloor (2+\sqrt3)^{100}\rfloor ;; \lceil(2+\sqrt3)^{100}\rceil
(2+\sqrt3)^{200}+(2-\sqrt3)^{200} ;; (2+\sqrt3)^{200}
(\sqrt2-1)^{500} ;; 0
10^{100}\bmod 7 ;; 3
7^{10^{9}}\bmod 10 ;; 7
\gcd(2^{100}-1,2^{60}-1) ;; 1
\tan 89.999999999^\circ ;; \tan 90^\circ
\frac{1}{10^{500}} ;; \frac{1}{10^{501}}
10^{500} ;; 10^{501}
\ln(10^{500}+1) ;; 500\ln 10
\ln(1+10^{-70}) ;; 0
\sin(10^{-60}) ;; 10^{-60}
\arctan(10^{60}) ;; \frac{\pi}{2}
\tanh(200) ;; 1
\frac{22}{7} ;; \pi
\sqrt[1000]{2} ;; 1
2^{10^{-50}} ;; 1
e^{-10000} ;; 0
e^{10000} ;; e^{10001}
\pi^{1000} ;; \pi^{1001}
10:00 ;; 10
0:00 ;; 1:00
24:00 ;; 12:00
1:05 ;; 1:50
8:30 ;; 9:30
x:y ;; y:x
2:3:4 ;; 3:4:5
3:2 ;; 3:2:1
\frac{x-x}{0} ;; 0
\frac{5}{0} ;; 5
\log_1 5 ;; \log_1 6
\sqrt{-1} ;; 1
\sqrt{-1} ;; -i
(-8)^{1/3} ;; 2
\cos t\cdot t ;; \cos t^2
\tan x \cdot 2 ;; \tan 2x
\exp(2)\cdot 3 ;; \exp(6)
\ln x\cdot y ;; \ln(xy)
\arcsin x\cdot 2 ;; \arcsin 2x
\log_2(16) ;; \log_{16}2
\log_3(x) ;; \log(3x)
\sec^2(x) ;; \sec(2x)
3/(2x) ;; \frac32x
1/(x+1) ;; \frac1x+1
2/(3\pi) ;; \frac{2\pi}{3}
10^(-2) ;; 10^2
e^(x+1) ;; e^x+1
2^2 5 ;; 2^{25}
2^6 3^5 ;; 2^{63}\cdot5
abd ;; abc
d+p ;; dp
d ;; 1
dx ;; x
ln(2) ;; log(2)
exp(x) ;; x^e
abs(x-3) ;; x-3
floor(x) ;; abs(x)
ceil(3.2) ;; 3
\sinh^{-1}(1) ;; \frac{1}{\sinh 1}
9\mod 4 ;; 2
\frac{dx}{dt}=x ;; \frac{dt}{dx}=x
\frac{dx}{dt}=x ;; \frac{dx}{dt}=t
\frac{d^2y}{dx^2}=y ;; \frac{d^2x}{dy^2}=y
f(x)=2x ;; f(t)=2t+1
f(x,y)=x^y ;; f(a,b)=b^a
f(t)=t ;; g(t)=t
h(x)=x ;; h(y)=x
2\begin{pmatrix}\frac13\\1\end{pmatrix} ;; \begin{pmatrix}0.66666666\\2\end{pmatrix}
\begin{pmatrix}2&0\\0&1\end{pmatrix}^{300} ;; \begin{pmatrix}2^{300}+1&0\\0&1\end{pmatrix}
[0,5]\cap[2,9] ;; [2,5)
\mathbb{R}\setminus\{0\} ;; \mathbb{R}\setminus\{0.00000001\}
2>1 ;; 3>2
2^{100}>3^{50} ;; 5>3
\sqrt2>1.4 ;; \sqrt2>1.3
5\ne 6 ;; 7\ne 8
1=2 ;; 3=5
\pi>3 ;; e>2
f(1)=2 ;; f(2)=4
f(2)=3 ;; g(3)=4
f(0)<1 ;; f(1)<1
f(1)+f(2)=3 ;; f(1)=7
P(A)=\frac12 ;; P(B)=\frac12
f(a)=3 ;; f(b)=3
P(X=2)=\frac12 ;; P(X=3)=\frac12
f^{-1}(x)=2x ;; f(t)=2t
f'(x)=2x ;; f(t)=2t
tea ;; eat
ear ;; are
5 g ;; 5\text{ seconds}
-7 \bmod 5 ;; -2
1.2x10^5 ;; 1.2x10^6
5 ;; \not> 5
x\not<5 ;; x<5
\gcd(n,1009) ;; 1
\lfloor\frac{n}{2025}\rfloor ;; \lfloor\frac{n}{2024}\rfloor
|x-10^6| ;; 10^6-x
\max(0,n-50) ;; 0
i^n ;; (-1)^n
\frac{1}{x-x} ;; \frac{2}{x-x}
1:0 ;; 2:0
7:30\text{ a.m.} ;; 7:30\text{ p.m.}
-11_2 ;; -11_3
1.1_2 ;; 1.1_3
\frac{\partial u}{\partial x} ;; \frac{\partial x}{\partial u}
\log_2 3 \cdot 4 ;; \log_2 12
\begin{pmatrix} 1,200\end{pmatrix} ;; \begin{pmatrix} 1&200\end{pmatrix}
f(1,000) ;; f(1000)
\sum_{k=0}^{99} \frac{1}{k!} ;; e
\sum_{k=1}^{200} \frac{1}{2^k k} ;; \ln 2
\int_0^{100} e^{-x}dx ;; 1
e-\sum_{k=0}^{100}\frac{1}{k!} ;; e-\sum_{k=0}^{101}\frac{1}{k!}
5\,\mathrm{mA} ;; 5\,\mathrm{A}
5\text{ N m} ;; 5\text{ N/m}
5\text{ percent} ;; 5\text{ cents}
5\% ;; 5\text{ m}
5\text{ kW} ;; 5\text{ MW}
5\text{ kW} ;; 5\text{ kJ}
5\text{ mW} ;; 5\text{ MW}
5\text{ N}\cdot\text{m} ;; 5\text{ N}
5\text{ V/m} ;; 5\text{ V}
3 \pmod 7 ;; 3 \pmod 8
3 \pmod 7 ;; x\equiv 4 \pmod 7
3 \pmod 7 ;; x\equiv 3 \pmod{17}
"""


def pairs(text: str) -> list[tuple[str, str]]:
    found = [tuple(line.split(" ;; ")) for line in text.strip().splitlines()]
    return found + [(b, a) for a, b in found]


@pytest.mark.parametrize(("gold", "answer"), pairs(EQUAL))
def test_equal(gold, answer):
    assert answers_equal(gold, answer, Symbolic()) is True


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_different(gold, answer):
    assert answers_equal(gold, answer, Symbolic()) is False


def random_number(choose: random.Random, depth: int) -> tuple[str, Fraction]:
    """A formula and its value, by exact arithmetic that shares nothing with the package."""
    kind = choose.randrange(8) if depth else 0
    if kind <= 1:
        n, m = choose.randint(1, 99), choose.randint(1, 99)
        return (str(n), Fraction(n)) if choose.random() < 0.5 else (rf"\frac{{{n}}}{{{m}}}", Fraction(n, m))
    if kind == 2:
        n = choose.randint(0, 40)
        return f"{n}!", Fraction(math.factorial(n))
    a, x = random_number(choose, depth - 1)
    if kind == 3:
        n = choose.randint(0, 15)
        return rf"\left({a}\right)^{{{n}}}", x**n
    b, y = random_number(choose, depth - 1)
    if kind == 4:
        return f"({a})+({b})", x + y
    if kind == 5:
        return f"({a})-({b})", x - y
    if kind == 6 or y == 0:
        return rf"({a})\cdot({b})", x * y
    return rf"\frac{{{a}}}{{{b}}}", x / y


@pytest.mark.parametrize("seed", range(100))
def test_random_numbers_are_compared_exactly(seed):
    choose = random.Random(seed)
    (a, x), (b, y) = random_number(choose, 3), random_number(choose, 3)
    assert answers_equal(a, b, Symbolic()) is (x == y)
    base, power = choose.choice("237"), choose.randint(1, 900)
    assert answers_equal(a, rf"({a})+\frac{{1}}{{{base}^{{{power}}}}}", Symbolic()) is False
    assert answers_equal(a, rf"({a})-{base}^{{-{power}}}+{base}^{{-{power}}}", Symbolic()) is True
    # Through a root, where no value is a fraction
    assert answers_equal(a, rf"\frac{{\sqrt2({a})\sqrt2}}{{2}}", Symbolic()) is True
    assert answers_equal(a, rf"\frac{{\sqrt2({a}+{base}^{{-{power}}})\sqrt2}}{{2}}", Symbolic()) is False


def test_what_cannot_be_decided_is_too_large():
    for a, b in [(r"2^{10^{7}}", r"2^{10^{7}}+1"), (r"(10^7)!+\pi", r"(10^7)!"), (r"x^{9^{9^9}}", "x")]:
        with pytest.raises(TooLarge):
            answers_equal(a, b, Symbolic())


NESTED = {
    "equations": "{" * 330 + "2=2" + "}=2" * 330,
    "parentheses": "(" * 400 + "2" + ")" * 400,
    "both": "{(" * 250 + "2" + ")}" * 250,
    "ligatures": "\ufdfa" * 990,
    "nested ligatures": "(" * 250 + "\ufdfa" * 490 + ")" * 250,
    "nested fractions": "(½," * 400 + "1" + ",2)" * 400,
    "powers": "2^{" * 300 + "2" + "}" * 300,
    "signs": r"\sin" + "-" * 900 + "x",
    "tower": "x^" * 600 + "x",
    "matrices": r"\begin{pmatrix}" * 33 + "1" + r"\end{pmatrix}" * 33,
}


@pytest.mark.parametrize("kind", NESTED)
def test_deep_nesting_is_not_accepted_and_cheap(kind):
    start = time.process_time()
    assert answers_equal("2", NESTED[kind], Exact()) in (False, None)
    with contextlib.suppress(TooLarge):
        assert answers_equal("2", NESTED[kind], Symbolic()) in (False, None)
    # Two seconds: some 0.1 s each, where such answers took ten
    assert time.process_time() - start < 2


def test_deep_nesting_does_not_end_a_run():
    counts = {}
    answers = [NESTED["equations"], NESTED["powers"], "2"]
    rewards = MathReward(end_of_thinking=None)(
        [""] * 3, [rf"\boxed{{{answer}}}" for answer in answers], answer=["2"] * 3, log_metric=counts.__setitem__
    )
    assert rewards == [0.0, 0.0, 1.0]
    assert counts["rewards/MathReward/timeouts"] == 1  # the powers are too large, the equations wrong


def test_normal_text_is_at_most_twice_as_long():
    assert len(normalize("\ufdfa" * 500)) <= 1000


def test_a_long_list_in_another_order_reads_each_formula_once():
    class Counting(Symbolic):
        reads = 0

        def _formula(self, text):
            self.reads += text not in self._read
            return super()._formula(text)

    comparison = Counting()
    gold = ", ".join(f"x^{{{n}}}+{n}x" for n in range(2, 32))
    answer = ", ".join(f"{n}x+x^{{{n}}}" for n in range(31, 1, -1))
    assert answers_equal(gold, answer, comparison) is True
    assert comparison.reads == 60
